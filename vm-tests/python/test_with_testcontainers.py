"""Four programs as users of testcontainers write them."""

import urllib.request

from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.waiting_utils import wait_for_logs

SERVER = "sh -c 'mkdir /pages; echo served > /pages/index.html; echo ready; exec httpd -f -p 80 -h /pages'"


def get(container):
    address = f"http://{container.get_container_host_ip()}:{container.get_exposed_port(80)}/"
    with urllib.request.urlopen(address, timeout=120) as answer:
        return answer.read()


def test_a_server_is_reached_at_its_published_port():
    with DockerContainer("busybox").with_command(SERVER).with_exposed_ports(80) as server:
        wait_for_logs(server, "ready", timeout=120)
        assert get(server) == b"served\n"


def test_a_command_runs_in_a_container():
    with DockerContainer("busybox").with_command("sleep 1000").with_env("WORD", "given") as container:
        status, output = container.exec(["sh", "-c", "echo $WORD; exit 3"])
        assert (status, output) == (3, b"given\n")


def test_two_containers_meet_in_a_network():
    with Network() as network:
        server = DockerContainer("busybox").with_command(SERVER).with_network(network).with_network_aliases("web")
        with server:
            wait_for_logs(server, "ready", timeout=120)
            with DockerContainer("busybox").with_command("sleep 1000").with_network(network) as client:
                status, output = client.exec(["wget", "-q", "-O", "-", "http://web/"])
                assert (status, output) == (0, b"served\n")


def test_two_servers_have_ports_of_their_own():
    first = DockerContainer("busybox").with_command(SERVER).with_exposed_ports(80)
    second = DockerContainer("busybox").with_command(SERVER.replace("served", "other")).with_exposed_ports(80)
    with first, second:
        for server in (first, second):
            wait_for_logs(server, "ready", timeout=120)
        assert (get(first), get(second)) == (b"served\n", b"other\n")
