//! The command line in a VM: the same lines by `dorm` and by Debian's docker client, and what only a terminal or a
//! kill shows.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dormouse_api::{ChangeSettings, CreateSession, HoldInfo, HoldKind, IdleTimeout, Phase, SessionInfo};
use dormouse_vm_tests::project;
use dormouse_vm_tests::stage::{Stage, becomes, fall_asleep, inspect, program, until};
use expectrl::Expect;
use expectrl::session::OsSession as Terminal;

/// Lines of shell, `$X` being the client: what they print and how they end is the same with both. Each leaves the engine as it
/// found it. `cc` is a running container, `$T` a folder. Where docker's own order is one of a hash table (its client's of
/// variables, its engine's of mounts), what is printed is sorted.
const SAME: &[&str] = &[
    // Lists.
    "$X ps --format '{{.Names}} {{.Image}} {{.State}} {{.Networks}} {{.Label \"k\"}}'",
    "$X ps -a --format 'table {{.Names}}\\t{{.Image}}\\t{{.Command}}\\t{{.Ports}}'",
    "$X ps | sed 's/ago.*cc$/ago cc/; s/[A-Za-z0-9]* [a-z]* ago/ago/'",
    "$X ps -aq; $X ps -aq --no-trunc; $X ps -l --format '{{.ID}}'; $X ps -n 1 -q",
    "$X ps -f name=cc -f status=running --format '{{.Names}}'; $X ps -f name=nosuch",
    "$X ps --format json | sed 's/\"RunningFor\":\"[^\"]*\"//; s/\"Status\":\"[^\"]*\"//'",
    "$X ps -s --format '{{.Size}}'",
    "$X ps --filter label=k=w --format '{{.Label \"k\"}}'; $X ps --filter label=nosuch -q; $X ps -a --filter exited=99 -q; $X ps -a --filter before=cc -q; $X ps -a -f since=nosuch; echo $?",
    "$X volume ls -f dangling=true -q; $X volume inspect -f '{{json .Labels}} {{.Driver}}' vv; $X volume create --driver nosuch vz; echo $?",
    "$X network create --driver nosuch nz; echo $?; $X network inspect nosuch; echo $?; $X network ls -f driver=bridge --format '{{.Name}}'",
    "$X image ls -f dangling=true -q; $X image ls -f reference='busy*' --format '{{.Repository}}'; $X image ls --filter bad; echo $?",
    "$X container ls --bogus; echo $?; $X ps -f bad; echo $?; $X ps extra",
    "$X images; $X images -q; $X images --no-trunc; $X images --digests; $X images nosuch",
    "$X images --format json; $X image ls --format '{{.Repository}}:{{.Tag}} {{.ID}}' busybox",
    "$X volume ls; $X volume ls -q; $X volume ls --format json; $X volume ls -f name=vv",
    "$X network ls --format '{{.Name}} {{.Driver}} {{.Scope}}'; $X network ls -q --no-trunc",
    "$X history busybox | sed 's/[0-9a-z]* [a-z]* ago/ago/'; $X history -q --no-trunc busybox; $X history --format '{{.Size}} {{.CreatedBy}}' -H=false busybox",
    // Details.
    "$X inspect cc | sed '/Pid\"/d'",
    "$X inspect -f '{{.State.Status}} {{json .Config.Labels}} {{.HostConfig.RestartPolicy.Name}} {{range .Config.Env}}<{{.}}>{{end}}' cc",
    "$X inspect --format '{{index .Config.Cmd 0}} {{len .Mounts}} {{.NetworkSettings.Networks.bridge.Gateway}} {{join .Config.Cmd \"|\"}}' cc",
    "$X inspect nosuch; echo $?; $X inspect cc nosuch --format '{{.Name}}'",
    "$X image inspect busybox; $X image inspect busybox -f '{{.ID}} {{.Architecture}} {{.RepoTags}}'",
    "$X network inspect bridge -f '{{.Name}} {{.Driver}} {{(index .IPAM.Config 0).Subnet}}'; $X volume inspect vv; $X volume inspect nosuch",
    "$X inspect --type volume vv -f '{{.Name}}'; $X inspect --type image cc; echo $?",
    "$X port cc; $X port cc 80; $X port cc 81; echo $?; $X top cc | head -n 1; $X diff cc | sort",
    "$X info --format '{{.Driver}} {{.OSType}} {{.Containers}}'; $X system df --format '{{.Type}} {{.TotalCount}} {{.Active}}'",
    "$X system df -v | sed 's/[A-Za-z0-9]* [a-z]* ago/ago/g; s/Up [A-Za-z0-9]* [a-z]*/Up/' | tr -s ' '; $X system df -v --format '{{len .Images}} {{range .Volumes}}{{.Name}} {{.Links}} {{.Size}}{{end}}'; $X system df --bogus; echo $?",
    // Output.
    "$X logs cc; $X logs cc 2>/dev/null; $X logs --tail 1 cc; $X logs -n 0 cc; $X logs -t cc | cut -c 1-4; $X logs nosuch; echo $?",
    "$X logs --since 2001-01-01T00:00:00Z --until 1h cc; $X logs --since nonsense cc; echo $?",
    // Processes.
    "$X exec cc sh -c 'echo out; echo err >&2; exit 3'",
    "printf 'a\\0b' | $X exec -i cc cat | od -c",
    "head -c 3000000 /dev/zero | $X exec -i cc wc -c",
    "$X exec -e B=2 -w /tmp -u nobody cc sh -c 'echo $B $PWD; id -un'",
    "$X exec cc nosuch; echo $?; $X exec cc /etc; echo $?; $X exec nosuch true; echo $?; $X exec cc",
    "$X exec -d cc touch /tmp/detached; echo $?",
    "$X exec -t cc sh -c 'test -t 1 && echo a terminal'",
    "$X exec -it cc true </dev/null; echo $?; $X run -it --rm busybox true </dev/null",
    // Containers.
    "$X run --rm busybox sh -c 'echo out; echo err >&2; exit 7'",
    "$X run --rm busybox nosuch; echo $?; $X run --rm busybox /etc; echo $?",
    "$X run --pull never nosuch true; echo $?; $X run --rm --bogus busybox; echo $?; $X run; echo $?; $X run --rm --cpus x busybox",
    "echo piped | $X run -i --rm -v vv:/v --tmpfs /t -e K=V --entrypoint sh busybox -c 'cat; echo $K $0; ls -d /v /t'",
    "$X run -d --name rr busybox sh -c 'trap \"exit 9\" TERM; while :; do sleep 1; done' | wc -c; $X stop rr; $X wait rr; $X start rr; $X kill rr; $X wait rr; $X rename rr r2; $X rm r2",
    "$X create --name kk busybox sh -c 'echo hello; exit 4' | wc -c; $X start -a kk; echo $?; $X logs kk; $X rm kk; $X rm kk; echo $?",
    "$X pause cc; $X ps --format '{{.State}}'; $X unpause cc; $X pause nosuch; echo $?; $X kill nosuch; echo $?",
    "$X update --pids-limit 100 cc; $X inspect -f '{{.HostConfig.PidsLimit}}' cc; $X stop nosuch; echo $?; $X rm cc; echo $?",
    "$X container prune -f; $X image prune -f; $X volume prune -f; $X network prune -f; echo n | $X container prune; echo $?",
    "$X create --name qq -m 64m --cpus 0.5 -h name --dns 1.2.3.4 --add-host a:1.2.3.4 --ulimit nofile=10:20 busybox true | wc -c; $X inspect -f '{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.Config.Hostname}} {{.HostConfig.Dns}} {{.HostConfig.ExtraHosts}} {{range .HostConfig.Ulimits}}{{.Name}}={{.Soft}}:{{.Hard}}{{end}}' qq; $X rm qq",
    "$X create --name qq --restart on-failure:3 --health-cmd true --health-interval 30s --stop-signal INT --stop-timeout 3 busybox true | wc -c; $X inspect -f '{{json .HostConfig.RestartPolicy}} {{json .Config.Healthcheck}} {{.Config.StopSignal}} {{.Config.StopTimeout}}' qq; $X rm qq",
    "$X create --name qq --mount type=volume,source=vv,target=/w,readonly --tmpfs /t:size=1m -v /anon busybox true | wc -c; $X inspect -f '{{json .HostConfig.Mounts}} {{json .HostConfig.Tmpfs}} {{json .Config.Volumes}}' qq; $X rm -v qq",
    "$X create --cidfile $T/cid busybox true | wc -c; wc -c < $T/cid; $X create --cidfile $T/cid busybox true; $X rm $(cat $T/cid) | wc -c; rm $T/cid",
    "echo A=1 > $T/env; $X create --name qq --env-file $T/env -e B=2 -e HOME -e NOSUCH busybox true | wc -c; $X inspect -f '{{range .Config.Env}}{{println .}}{{end}}' qq | sort; $X rm qq",
    "$X create --name qq --cap-add SYS_TIME --cap-drop ALL --security-opt no-new-privileges --read-only --init --pids-limit 9 --sysctl net.ipv4.ip_forward=0 busybox true | wc -c; $X inspect -f '{{.HostConfig.CapAdd}} {{.HostConfig.CapDrop}} {{.HostConfig.SecurityOpt}} {{.HostConfig.ReadonlyRootfs}} {{.HostConfig.Init}} {{.HostConfig.PidsLimit}} {{.HostConfig.Sysctls}}' qq; $X rm qq",
    "$X stats --no-stream --format '{{.Name}} {{.ID}}' cc; $X stats --no-stream nosuch; echo $?; $X inspect; echo $?",
    // Files.
    "echo data > $T/f; $X cp $T/f cc:/tmp/f; $X exec cc cat /tmp/f; $X cp cc:/tmp/f $T/g; cat $T/g; $X cp cc:/tmp/f - | tar -t; $X exec cc rm /tmp/f",
    "mkdir -p $T/d/e; echo 1 > $T/d/e/f; $X cp $T/d cc:/tmp/; $X cp $T/d/. cc:/tmp/d2; $X exec cc find /tmp/d /tmp/d2 | sort; rm -rf $T/out; $X cp cc:/tmp/d $T/out; find $T/out | sed s,$T,, | sort; $X exec cc rm -r /tmp/d /tmp/d2",
    "tar -C $T -c f | $X cp - cc:/tmp; $X exec cc sh -c 'cat /tmp/f; rm /tmp/f'; $X cp nosuch:/x $T; echo $?; $X cp cc:/nosuch $T; echo $?; $X cp $T/nosuch cc:/; echo $?",
    "$X export cc | tar -t | sort | head -n 5; $X save busybox | tar -t | grep -c json; $X save -o $T/s.tar nosuch; echo $?; test -e $T/s.tar",
    "$X export -o $T/e.tar cc; tar -tf $T/e.tar | sort | head -n 3; rm $T/e.tar; $X export -o $T/no/such cc; echo $?; $X export nosuch; echo $?",
    "mkdir $T/l; echo linked > $T/l/target; ln -s target $T/l/link; $X cp -L $T/l/link cc:/tmp/; $X cp $T/l/link cc:/tmp/bare; $X exec cc sh -c 'test -h /tmp/link; echo $?; cat /tmp/link; readlink /tmp/bare; rm /tmp/link /tmp/bare'; rm -r $T/l",
    "mkdir $T/l; $X exec cc sh -c 'echo there > /tmp/real; ln -s /tmp/real /tmp/link'; $X cp -L cc:/tmp/link $T/l; $X cp -L cc:/tmp/link $T/l/named; $X cp cc:/tmp/link $T/l/bare; cd $T/l; ls; cat link named; readlink bare; $X exec cc rm /tmp/real /tmp/link; rm -r $T/l",
    "$X exec cc head -c 60000 /dev/zero | head -c 1 | wc -c; yes | $X exec -i cc head -n 1; $X ps -a | true; $X images | head -n 0; $X logs cc 2>&1 | head -n 1; echo $?",
    // Images.
    "$X tag busybox other:1; $X images -q other; $X rmi other:1; $X rmi nosuch; echo $?; $X rmi -f nosuch; echo $?; $X tag busybox BAD; echo $?",
    "$X commit -m why cc made:1 | cut -c 1-7; $X inspect -f '{{.Comment}}' made:1; $X rmi made:1 | cut -c 1-8",
    "tar -C $T -c f | $X import -c 'CMD [\"x\"]' - imported:1 | cut -c 1-7; $X inspect -f '{{.Config.Cmd}}' imported:1; $X rmi imported:1 | cut -c 1-8",
    "$X save busybox | $X load; $X load -i $T/f; echo $?; $X load -i $T/nosuch; echo $?",
    "printf 'FROM busybox\\nCOPY f /f\\nENV A=1\\n' > $T/Dockerfile; DOCKER_BUILDKIT=1 $X build -q -t built:1 $T | cut -c 1-7; $X inspect -f '{{json .Config.Env}}' built:1; $X rmi built:1 | cut -c 1-8; DOCKER_BUILDKIT=1 $X build -q $T/nosuch; echo $?",
    // Volumes and networks.
    "$X volume create vx; $X volume create --label a=b vx; $X volume rm vx; $X volume rm vx; echo $?; $X volume rm -f vx; echo $?",
    "$X network create --subnet 10.99.0.0/24 nx | wc -c; $X network connect nx cc; $X inspect -f '{{range $k, $v := .NetworkSettings.Networks}}{{$k}} {{end}}' cc; $X network disconnect nx cc; $X network rm nx; $X network rm nx; echo $?",
    "$X nonsense; echo $?; $X container nonsense >/dev/null 2>&1; echo $?",
    // Options of a container, a network and the rest, by what the engine was told.
    r#"$X create --name oo -h h --domainname d --expose 81-82/udp -P --label-file $T/labels --annotation a=b --dns-option ndots:3 --dns-search example --group-add 7 --userns host --ipc private --cgroupns private --runtime runc busybox true | wc -c; $X inspect -f '{{json .Config}}{{json .HostConfig}}' oo; $X rm oo"#,
    r#"$X create --name oo -h h --memory 64m --memory-reservation 32m --shm-size 8m --cpuset-cpus 0 --oom-score-adj 100 --oom-kill-disable --cgroup-parent /p --log-driver json-file --log-opt max-size=1m --device /dev/null:/dev/x:r --gpus all busybox true | wc -c; $X inspect -f '{{json .Config}}{{json .HostConfig}}' oo; $X rm oo"#,
    r#"$X create --name oo -h h --health-cmd true --health-retries 2 --health-timeout 3s --health-start-period 4s --health-start-interval 5s --mac-address 02:42:ac:11:00:99 --link cc:alias --platform linux/amd64 busybox true | wc -c; $X inspect -f '{{json .Config}}{{json .HostConfig}}{{range .NetworkSettings.Networks}}{{.MacAddress}}{{end}}' oo; $X rm oo"#,
    r#"$X create --name oo -h h --no-healthcheck --volumes-from cc --volume-driver local -v od:/d busybox true | wc -c; $X inspect -f '{{json .Config}}{{json .HostConfig}}' oo; $X rm oo; $X volume rm od; $X create --name oo --uts host busybox true | wc -c; $X inspect -f '{{.HostConfig.UTSMode}}' oo; $X rm oo; $X create --storage-opt size=1G busybox true; echo $?; $X create --platform linux/arm64 busybox true; echo $?"#,
    r#"$X run --rm --ipc none --oom-score-adj 100 --group-add 7 --device /dev/null:/dev/x --dns-search example --dns-option ndots:3 --cpuset-cpus 0 --annotation a=b busybox sh -c 'cat /proc/self/oom_score_adj; id -G; ls /dev/x; grep -E "search|options" /etc/resolv.conf; grep Cpus_allowed_list /proc/self/status; ls /dev/shm 2>&1'"#,
    r#"$X run --rm --log-driver none --volumes-from cc --add-host a:1.2.3.4 --link cc:alias --domainname d -h h busybox sh -c 'hostname -f; ls -d /v; grep -c alias /etc/hosts; grep 1.2.3.4 /etc/hosts'; $X run --name oo --log-driver none busybox echo unlogged; $X logs oo; echo $?; $X rm oo"#,
    r#"$X network create --subnet 10.98.0.0/16 --gateway 10.98.0.9 --ip-range 10.98.1.0/24 --aux-address one=10.98.0.3 --internal --attachable --ipam-driver default --ipam-opt a=b -o x=y --label k=v nn | wc -c; $X network inspect -f '{{json .IPAM}}{{.Internal}}{{.Attachable}}{{json .Options}}{{json .Labels}}' nn; $X create --name oo --network nn --ip 10.98.1.7 --network-alias al busybox true | wc -c; $X inspect -f '{{range .NetworkSettings.Networks}}{{json .IPAMConfig}}{{.Aliases}}{{end}}' oo; $X rm oo; $X network rm nn"#,
    r#"$X network create --ipv6 --subnet 10.97.0.0/16 --subnet fd00:97::/64 nn | wc -c; $X network inspect -f '{{.EnableIPv6}}' nn; $X create --name oo busybox sleep 1000 | wc -c; $X network connect --ip 10.97.0.7 --ip6 fd00:97::7 --alias al --link cc:other --link-local-ip 169.254.3.4 --driver-opt x=y nn oo; $X inspect -f '{{with .NetworkSettings.Networks.nn}}{{json .IPAMConfig}}{{.Aliases}}{{.Links}}{{json .DriverOpts}}{{end}}' oo; $X rm oo; $X network rm nn"#,
    r#"$X update --memory 128m --memory-reservation 32m --memory-swap -1 --cpuset-cpus 0 --cpu-shares 512 --restart no cc; $X inspect -f '{{.HostConfig.Memory}} {{.HostConfig.MemoryReservation}} {{.HostConfig.CpusetCpus}} {{.HostConfig.CPUShares}} {{json .HostConfig.RestartPolicy}}' cc"#,
    r#"$X run -d --name oo --log-opt labels=k --label k=v busybox echo hello | wc -c; $X wait oo; $X logs --details oo; $X logs --details -t oo | cut -d ' ' -f 2-; $X rm oo; printf 'FROM busybox\nRUN echo x > /x\n' > $T/Dockerfile; DOCKER_BUILDKIT=1 $X build -q -t kept:1 $T | wc -c; $X rmi --no-prune kept:1 | wc -l"#,
    r#"tar -C $T -c f | $X import --platform linux/amd64 -m why -c 'CMD ["x"]' - imported:2 | cut -c 1-7; $X inspect -f '{{.Os}}/{{.Architecture}} {{.Comment}} {{.Config.Cmd}}' imported:2; $X rmi imported:2 | cut -c 1-8; tar -C $T -c f | $X import --platform bogus/x/y/z -; echo $?"#,
    r#"printf 'FROM busybox\nRUN uname -m > /m\n' > $T/Dockerfile; DOCKER_BUILDKIT=1 $X build -q --platform linux/amd64 --cache-from busybox -t built:2 $T | cut -c 1-7; $X inspect -f '{{.Architecture}}' built:2; $X rmi built:2 | cut -c 1-8"#,
    r#"$X run -d --name oo busybox sh -c 'trap "echo got; exit 3" TERM; while :; do echo up; sleep 0.1; done' | wc -c; mkfifo $T/said; $X attach --no-stdin oo > $T/said & p=$!; { read up; echo $up; kill -TERM $p; grep got; } < $T/said; wait $p; echo $?; rm $T/said; $X rm oo"#,
    r#"$X run -d --name oo busybox sh -c 'trap "exit 3" TERM; while :; do echo up; sleep 0.1; done' | wc -c; mkfifo $T/said; $X attach --no-stdin --sig-proxy=false oo > $T/said & p=$!; { read up; echo $up; kill -TERM $p; cat > /dev/null; } < $T/said; wait $p; echo $?; $X inspect -f '{{.State.Running}}' oo; rm $T/said; $X rm -f oo"#,
    r#"$X builder prune -f --keep-storage 1g; $X search --limit 200 busybox; echo $?; $X search --no-trunc; echo $?"#,
];

/// Which of the lines are compared: each takes a few seconds, and all of them are for `make test-long`.
const EVERY: usize = if cfg!(feature = "long") { 1 } else { 8 };

/// One VM for all of it: each start costs seconds.
#[tokio::test(flavor = "multi_thread")]
async fn dorm_does_what_docker_does_and_gives_back_what_it_held() -> Result<()> {
    let stage = Stage::new()?;
    let session = stage.create(600).await?;
    stage.load_busybox(&session).await?;
    let folder = stage.home().join("files");
    std::fs::create_dir(&folder)?;
    // What lines put into the VM that aren't about copying it there.
    std::fs::write(folder.join("f"), "data\n")?;
    std::fs::write(folder.join("labels"), "from=file\n")?;
    let script = "echo started; echo oops >&2; while :; do sleep 1; done";
    let run = [
        "run",
        "--detach",
        "--name",
        "cc",
        "--label",
        "k=w",
        "--publish",
        "127.0.0.1:18080:80",
        "--volume",
        "vv:/v",
        "busybox",
        "sh",
        "-c",
        script,
    ];
    stage.succeed(&session, &run).await?;

    a_terminal_works_and_is_given_back(&stage)?;
    a_panic_gives_the_terminal_back(&stage)?;
    without_a_terminal_all_of_an_attached_container_comes(&stage, &session).await?;
    killed_commands_hold_nothing(&stage, &session).await?;
    the_same_lines_do_the_same(&stage, &session).await?;
    a_container_outlives_the_command_that_ran_it(&stage, &session).await?;
    what_only_tells_something_wakes_nothing(&stage, &session).await?;
    an_exit_code_survives_a_short_grace(&stage, &session).await?;
    a_wake_that_was_set_comes(&stage, &session).await?;
    fall_asleep(&session).await?;
    a_monitor_wakes_nothing_and_gives_the_terminal_back(&stage, &session).await?;
    a_store_is_entered_and_stays(&stage).await
}

/// A shell in which `$X` is a client.
fn shell(stage: &Stage, session: &SessionInfo, client: &str, line: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", line])
        .env("X", client)
        .env("T", stage.home().join("files"))
        .env("DORM_HOME", stage.home())
        .env("DOCKER_HOST", format!("unix://{}", session.docker_socket.display()))
        .env("DOCKER_CONFIG", stage.home().join("docker-config"))
        .env("DOCKER_BUILDKIT", "0")
        .stdin(Stdio::null());
    command
}

async fn the_same_lines_do_the_same(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let docker = project().join("build/clients/docker");
    let clients = [docker, program("dorm")].map(|path| path.to_string_lossy().into_owned());
    let mut differences = String::new();
    for line in SAME.iter().step_by(EVERY) {
        let mut outputs = Vec::new();
        for client in &clients {
            outputs.push(stage.finish(session, shell(stage, session, client, line)).await?);
        }
        let [docker, dorm] = outputs.as_slice() else { continue };
        if docker.stdout != dorm.stdout || docker.status.code() != dorm.status.code() {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            differences.push_str(&format!(
                "\n$ {line}\n-- docker: {:?}\n{}{}-- dorm: {:?}\n{}{}",
                docker.status.code(),
                text(&docker.stdout),
                text(&docker.stderr),
                dorm.status.code(),
                text(&dorm.stdout),
                text(&dorm.stderr),
            ));
        }
    }
    ensure!(differences.is_empty(), "{differences}");
    Ok(())
}

fn dorm(stage: &Stage, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("dorm"));
    command.args(arguments).env("DORM_HOME", stage.home()).env_remove("DORM_SESSION");
    command
}

/// A command with a terminal, from which nothing is waited for without end.
fn in_a_terminal(command: Command) -> Result<Terminal> {
    let mut terminal = Terminal::spawn(command)?;
    terminal.set_expect_timeout(Some(Duration::from_secs(120)));
    Ok(terminal)
}

fn a_terminal_works_and_is_given_back(stage: &Stage) -> Result<()> {
    // A shell's own line editing shows raw mode, its answer shows the size, its status comes back.
    let mut terminal = in_a_terminal(dorm(stage, &["exec", "-it", "cc", "sh"]))?;
    terminal.send_line("echo $((6 * 7)); test -t 0 && echo in")?;
    terminal.expect("42")?;
    terminal.expect("in")?;
    terminal.send("\x03")?;
    terminal.send_line("exit 5")?;
    terminal.expect(expectrl::Eof)?;
    ensure!(code(&mut terminal)? == 5, "the command's own status");

    // After it, and after one that is ended from outside, the terminal echoes again.
    for ending in ["true", "sh -c 'kill -9 $$'"] {
        let line = format!("{} exec -it cc {ending}; stty -a", program("dorm").display());
        let mut command = Command::new("sh");
        command.args(["-c", &line]).env("DORM_HOME", stage.home());
        let mut terminal = in_a_terminal(command)?;
        terminal.expect(" icanon")?;
        terminal.expect(expectrl::Eof)?;
    }

    // Detached: it runs on, and the status says that nothing is wrong.
    let mut terminal = in_a_terminal(dorm(stage, &["run", "-it", "--name", "dd", "busybox", "sh"]))?;
    terminal.send_line("echo rea''dy")?;
    terminal.expect("ready")?;
    terminal.send("\x10\x11")?;
    terminal.expect(expectrl::Eof)?;
    ensure!(code(&mut terminal)? == 0, "detaching is no failure");
    let output = dorm(stage, &["inspect", "--format", "{{.State.Status}}", "dd"]).output()?;
    ensure!(output.stdout == b"running\n", "{output:?}");

    // Joined again, and ended there: the status is the container's.
    let mut terminal = in_a_terminal(dorm(stage, &["attach", "--detach-keys", "ctrl-x,x", "dd"]))?;
    terminal.send_line("echo with''in")?;
    terminal.expect("within")?;
    terminal.send("\x18x")?;
    terminal.expect(expectrl::Eof)?;
    ensure!(code(&mut terminal)? == 0, "detaching by other keys is no failure");
    let mut terminal = in_a_terminal(dorm(stage, &["attach", "dd"]))?;
    terminal.send_line("echo $((20 + 3)); exit 6")?;
    terminal.expect("23")?;
    terminal.expect(expectrl::Eof)?;
    ensure!(code(&mut terminal)? == 6, "the container's own status");
    for line in [
        &["start", "-ai", "--detach-keys", "ctrl-x,x", "dd"][..],
        &["exec", "-it", "--detach-keys", "ctrl-x,x", "dd", "sh"],
    ] {
        let mut terminal = in_a_terminal(dorm(stage, line))?;
        terminal.send_line("echo st''ill")?;
        terminal.expect("still")?;
        terminal.send("\x18x")?;
        terminal.expect(expectrl::Eof)?;
        ensure!(code(&mut terminal)? == 0, "{line:?}");
    }
    // Archives are for files and pipes.
    for line in [&["export", "dd"][..], &["save", "busybox"], &["cp", "dd:/etc", "-"], &["load"]] {
        let mut terminal = in_a_terminal(dorm(stage, line))?;
        terminal.expect("hint: ")?;
        terminal.expect(expectrl::Eof)?;
        ensure!(code(&mut terminal)? == 1, "{line:?}");
    }
    ensure!(dorm(stage, &["rm", "--force", "dd"]).status()?.success(), "it can be removed");
    Ok(())
}

/// Its words come on a terminal that breaks lines again.
fn a_panic_gives_the_terminal_back(stage: &Stage) -> Result<()> {
    for words in ["exec -it cc true", "monitor"] {
        let line = format!("{} {words}; echo ended $?; stty -a", program("dorm").display());
        let mut command = Command::new("sh");
        command.args(["-c", &line]).env("DORM_HOME", stage.home()).env("TERM", "xterm");
        command.env("DORM_TEST_PANIC", "1");
        let mut terminal = in_a_terminal(command)?;
        terminal.expect("planted by a test\r\n").with_context(|| words.to_owned())?;
        terminal.expect("ended 101")?;
        terminal.expect(" icanon")?;
        terminal.expect(expectrl::Eof)?;
    }
    Ok(())
}

async fn without_a_terminal_all_of_an_attached_container_comes(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    let script = "until [ -e /go ]; do sleep 1; done; echo out; echo err >&2; exit 4";
    stage.succeed(session, &["run", "--detach", "--name", "aa", "busybox", "sh", "-c", script]).await?;
    let mut attach = dorm(stage, &["attach", "aa"]);
    attach.stdin(Stdio::null());
    let attached = stage.finish(session, attach);
    let let_go = async {
        until(session, |info| info.holds.iter().any(|hold| hold.reason.contains("/attach"))).await?;
        stage.succeed(session, &["exec", "aa", "touch", "/go"]).await
    };
    let (output, gone) = tokio::join!(attached, let_go);
    let (output, _) = (output?, gone?);
    ensure!(output.status.code() == Some(4), "{output:?}");
    ensure!(output.stdout == b"out\n" && output.stderr == b"err\n", "{output:?}");
    stage.succeed(session, &["rm", "aa"]).await?;
    Ok(())
}

/// Commands that only tell something: of the engine, of the session, or of nobody's. What a container wrote, to its files or
/// to its log, and what all of it takes, lies on the VM's disk: to be told of that (`diff`, `logs`, `system df`) wakes it.
const TELLS: &[&str] = &[
    "ps",
    "ps --all --size",
    "ps --all --format json --no-trunc",
    "images",
    "images --digests",
    "image ls --all",
    "volume ls",
    "network ls",
    "inspect cc",
    "inspect --size cc",
    "inspect --type image busybox",
    "image inspect busybox",
    "volume inspect vv",
    "network inspect bridge",
    "history busybox",
    "port cc",
    "info",
    "version --format json",
    "system df --host",
    "why",
    "why --format json",
    "session ls",
    "session ls --format json",
    "session inspect",
    "session history",
    "session logs",
    "session logs --console",
    "session events",
    "session trace",
    "session verify",
    "session docker-host",
    "docker-env",
    "settings show",
    "template ls",
    "completion bash",
    "help sleep",
];

/// What the engine has to be asked for it has been asked for within the hour.
async fn what_only_tells_something_wakes_nothing(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let mut woken = Vec::new();
    for asleep in [false, true] {
        if asleep {
            fall_asleep(session).await?;
        }
        let mut before = inspect(session).await?.vm;
        for line in TELLS {
            let words: Vec<_> = line.split(' ').collect();
            let output = stage.finish(session, dorm(stage, &words)).await?;
            ensure!(output.status.success(), "asleep {asleep}: {line}: {output:?}");
            let vm = inspect(session).await?.vm;
            if vm.start_count != before.start_count || (vm.phase == Phase::Absent) != asleep {
                woken.push(*line);
                fall_asleep(session).await?;
                before = inspect(session).await?.vm;
            }
        }
        // What it finds missing is the machine's.
        stage.finish(session, dorm(stage, &["doctor"])).await?;
        ensure!(inspect(session).await?.vm.start_count == before.start_count, "doctor woke it");
    }
    ensure!(woken.is_empty(), "it was woken by {woken:?}");
    Ok(())
}

fn code(terminal: &mut Terminal) -> Result<i32> {
    match terminal.get_process().wait()? {
        expectrl::process::unix::WaitStatus::Exited(_, code) => Ok(code),
        other => anyhow::bail!("it ended with {other:?}"),
    }
}

/// Longest that a dead client's holds may outlive it: the promise is a second, the rest is for a loaded machine.
const HELD_AT_MOST: Duration = Duration::from_secs(5);

/// What `dorm` or a connection of its own holds.
fn is_a_clients(hold: &HoldInfo) -> bool {
    matches!(hold.kind, HoldKind::Operation | HoldKind::Request) && !hold.weak
}

/// `kill -9` in the middle of whatever takes long. A command in a container that reads its input ends with it.
async fn killed_commands_hold_nothing(stage: &Stage, session: &SessionInfo) -> Result<()> {
    // A registry that takes the request and never answers it.
    let registry = ["run", "-d", "--name", "reg", "--network", "host", "busybox", "nc", "-l", "-p", "5000"];
    stage.succeed(session, &registry).await?;
    let image = std::fs::read(project().join("build/busybox.tar"))?;
    let half = &image[..image.len() / 2];
    for (arguments, words) in [
        (&["logs", "--follow", "cc"][..], "/logs"),
        (&["pull", "localhost:5000/never"], "/images/create"),
        (&["load"], "/images/load"),
        (&["exec", "-i", "cc", "cat"], "/exec/"),
    ] {
        let mut command = dorm(stage, arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        if arguments[0] == "load" {
            child.stdin.as_mut().context("piped")?.write_all(half)?;
        }
        until(session, |info| {
            info.holds.iter().any(|hold| is_a_clients(hold) && hold.reason.contains(words))
        })
        .await
        .with_context(|| format!("{arguments:?}"))?;
        child.kill()?;
        let killed = Instant::now();
        let info = until(session, |info| !info.holds.iter().any(is_a_clients)).await?;
        println!("figure: holds of a killed {}, ms = {}", arguments[0], killed.elapsed().as_millis());
        ensure!(killed.elapsed() < HELD_AT_MOST, "{arguments:?} held for {:?}", killed.elapsed());
        ensure!(info.vm.phase == Phase::Running, "{info:?}");
        child.wait()?;
    }
    stage.succeed(session, &["rm", "--force", "reg"]).await?;
    an_exec_that_cant_be_started_holds_nothing(stage, session).await
}

/// Its engine tells that it was started, and never that it has ended.
async fn an_exec_that_cant_be_started_holds_nothing(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let is_held = |info: &SessionInfo| info.holds.iter().any(|hold| hold.kind == HoldKind::Exec);
    until(session, |info| !is_held(info)).await?;
    let exec = stage.finish(session, dorm(stage, &["exec", "cc", "nosuch"]));
    let (output, held) = tokio::join!(exec, until(session, is_held));
    let (output, _) = (output?, held.context("it was never thought to run")?);
    ensure!(!output.status.success(), "{output:?}");
    until(session, |info| !is_held(info)).await?;
    Ok(())
}

/// As docker's does.
async fn a_container_outlives_the_command_that_ran_it(stage: &Stage, session: &SessionInfo) -> Result<()> {
    stage.succeed(session, &["stop", "cc"]).await?;
    let mut command = dorm(stage, &["run", "--name", "kk", "busybox", "sh", "-c", "echo up; sleep 100000"]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    child.stdout.as_mut().context("piped")?.read_exact(&mut [0])?;
    child.kill()?;
    child.wait()?;
    // The engine's word about a container comes a moment after its client's.
    let held = until(session, |info| {
        let strong: Vec<_> = info.holds.iter().filter(|hold| !hold.weak).collect();
        matches!(strong[..], [hold] if hold.kind == HoldKind::Container)
    });
    if let Err(error) = held.await {
        let listed = stage.succeed(session, &["ps", "--all"]).await?;
        return Err(error.context(listed));
    }
    ensure!(stage.succeed(session, &["ps", "--format", "{{.Names}}"]).await? == "kk\n");
    stage.succeed(session, &["rm", "--force", "kk"]).await?;
    Ok(())
}

/// Ended by a key, and from outside.
async fn a_monitor_wakes_nothing_and_gives_the_terminal_back(
    stage: &Stage,
    session: &SessionInfo,
) -> Result<()> {
    let starts = inspect(session).await?.vm.start_count;
    for (ends, status) in [("", "ended 0"), ("timeout --foreground --preserve-status 5", "ended 0")] {
        let dorm = program("dorm");
        let line =
            format!("stty rows 30 cols 120; {ends} {} monitor; echo ended $?; stty -a", dorm.display());
        let mut command = Command::new("sh");
        command.args(["-c", &line]).env("DORM_HOME", stage.home()).env("TERM", "xterm");
        let mut terminal = in_a_terminal(command)?;
        terminal.expect("sessions, 0 awake")?;
        terminal.expect("asleep")?;
        if ends.is_empty() {
            terminal.send("q")?;
        }
        // The screen that was there before.
        terminal.expect("\x1b[?1049l")?;
        terminal.expect(status)?;
        terminal.expect(" icanon")?;
        terminal.expect(expectrl::Eof)?;
    }
    ensure!(inspect(session).await?.vm.start_count == starts, "it was woken");
    let refused = dorm(stage, &["monitor"]).stdin(Stdio::null()).output()?;
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("a monitor needs a terminal"), "{refused:?}");
    Ok(())
}

/// A store of another home, or of a session that was removed, is as good as this copy of one.
async fn a_store_is_entered_and_stays(stage: &Stage) -> Result<()> {
    let mut wish = CreateSession::named("builder".parse()?);
    wish.storage = Some(stage.home().join("built"));
    stage.make(&wish).await?;
    let (built, store) = (stage.home().join("built"), stage.home().join("store"));
    let copied = Command::new("cp").args(["-a", "--sparse=always"]).args([&built, &store]).status()?;
    ensure!(copied.success(), "the store can't be copied");
    stage.remove("builder").await?;

    let path = store.to_string_lossy().into_owned();
    let enter = |path: &str, typed: &str| -> Result<(String, i32)> {
        let mut terminal = Terminal::spawn(dorm(stage, &["session", "enter", "--name", "visit", path]))?;
        terminal.set_expect_timeout(Some(Duration::from_secs(300)));
        if !typed.is_empty() {
            terminal.expect("session visit")?;
            terminal.send_line(typed)?;
        }
        let said = terminal.expect(expectrl::Eof)?;
        Ok((String::from_utf8_lossy(said.as_bytes()).into_owned(), code(&mut terminal)?))
    };
    let (_, status) = enter(&path, "id -u > /var/lib/docker/visited; exit 7")?;
    ensure!(status == 7, "the shell's own status");
    ensure!(store.join("data.raw").exists(), "the store stays");
    // Another VM, booted from the same disk.
    let (said, _) = enter(&path, "echo root is $(cat /var/lib/docker/visited); exit")?;
    ensure!(said.contains("root is 0"), "{said}");
    let (said, status) = enter("/nosuch", "")?;
    ensure!(status == 1 && said.contains("there is no store in /nosuch"), "{said}");
    let sessions = dorm(stage, &["session", "ls", "--quiet"]).output()?;
    ensure!(sessions.stdout == b"default\n", "{sessions:?}");
    Ok(())
}

async fn an_exit_code_survives_a_short_grace(stage: &Stage, session: &SessionInfo) -> Result<()> {
    let change = ChangeSettings { idle_timeout: Some(IdleTimeout::Seconds(1)), ..ChangeSettings::default() };
    let path = format!("/v1/sessions/{}/settings", session.name);
    stage.service().call::<_, SessionInfo>(http::Method::POST, &path, &change).await?;
    let remove = dorm(stage, &["rm", "--force", "cc"]);
    ensure!(stage.finish(session, remove).await?.status.success(), "the container can be removed");
    let run = dorm(stage, &["run", "--rm", "busybox", "sh", "-c", "sleep 2; exit 7"]);
    let output = stage.finish(session, run).await?;
    ensure!(output.status.code() == Some(7), "{output:?}");
    Ok(())
}

/// The VM sleeps a second after its last use.
async fn a_wake_that_was_set_comes(stage: &Stage, session: &SessionInfo) -> Result<()> {
    becomes(session, "absent").await?;
    let before = inspect(session).await?.vm.start_count;
    let at = jiff::Timestamp::now().checked_add(Duration::from_secs(2))?.to_string();
    let set = dorm(stage, &["session", "wake", "--at", &at, "--every", "1h"]);
    let output = stage.finish(session, set).await?;
    ensure!(String::from_utf8_lossy(&output.stdout).contains("then every 3600 s"), "{output:?}");
    until(session, |info| info.vm.start_count > before && info.vm.phase == Phase::Absent).await?;
    let listed = dorm(stage, &["session", "inspect", "--format", "json"]);
    let output = stage.finish(session, listed).await?;
    let info: SessionInfo = serde_json::from_slice(&output.stdout)?;
    ensure!(info.wakes.len() == 1 && info.wakes[0].at > jiff::Timestamp::now(), "{:?}", info.wakes);
    let cleared = stage.finish(session, dorm(stage, &["session", "wake", "--clear"])).await?;
    ensure!(cleared.status.success() && cleared.stdout.is_empty(), "{cleared:?}");
    Ok(())
}
