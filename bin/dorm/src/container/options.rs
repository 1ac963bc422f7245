//! The options of `run` and `create`, and what they come to in the engine's words.

use std::path::PathBuf;

use clap::{ArgAction, Args};
use serde_json::{Map, Value, json};

use super::mount::Mounts;
use super::port::Ports;
use super::variables::{environment, labels, pairs};
use crate::value::{cpus, go_duration, restart, signed_size, size, ulimit};

#[derive(Args, Debug, Default)]
pub(crate) struct Options {
    /// Print this help.
    #[arg(long, action = ArgAction::Help)]
    help: Option<bool>,
    /// What to call it.
    #[arg(long, help_heading = "Container")]
    pub(crate) name: Option<String>,
    /// Keep standard input open.
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give it a terminal.
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Attach to STDIN, STDOUT or STDERR only.
    #[arg(short, long, value_name = "STREAM", value_parser = ["stdin", "stdout", "stderr", "STDIN", "STDOUT", "STDERR"])]
    pub(crate) attach: Vec<String>,
    /// Remove it once it has ended, and its anonymous volumes.
    #[arg(long)]
    pub(crate) rm: bool,
    /// Set a variable; without a value, take ours.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Set the variables of a file.
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Mount a volume, or a folder of this machine; a volume without a name is the container's own.
    #[arg(short, long, value_name = "[NAME|FOLDER:]/PATH[:ro]")]
    volume: Vec<String>,
    /// Mount the volumes of another container.
    #[arg(long, value_name = "CONTAINER")]
    volumes_from: Vec<String>,
    /// Mount a volume, memory, or a folder of this machine.
    #[arg(long, value_name = "type=volume|tmpfs|bind,source=NAME|FOLDER,target=/PATH[,readonly]")]
    mount: Vec<String>,
    /// Mount memory.
    #[arg(long, value_name = "/PATH[:OPTIONS]")]
    tmpfs: Vec<String>,
    /// Publish a port.
    #[arg(short, long, value_name = "[IP:][HOST:]PORT[/PROTOCOL]")]
    publish: Vec<String>,
    /// Publish every exposed port.
    #[arg(short = 'P', long)]
    publish_all: bool,
    /// Expose a port.
    #[arg(long, value_name = "PORT")]
    expose: Vec<String>,
    /// Start in this folder.
    #[arg(short, long, value_name = "PATH")]
    workdir: Option<String>,
    /// Run as this user.
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Run with this group as well.
    #[arg(long, value_name = "GROUP")]
    group_add: Vec<String>,
    /// Run this instead of the image's entrypoint.
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Label it.
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    label: Vec<String>,
    /// Label it with the lines of a file.
    #[arg(long, value_name = "FILE")]
    label_file: Vec<PathBuf>,
    /// Annotate it.
    #[arg(long, value_name = "NAME=VALUE")]
    annotation: Vec<String>,
    /// Connect it to this network.
    #[arg(long, visible_alias = "net", value_name = "NETWORK")]
    network: Vec<String>,
    /// Its name within the network.
    #[arg(long, value_name = "NAME")]
    network_alias: Vec<String>,
    /// Link it to another container.
    #[arg(long, value_name = "CONTAINER[:ALIAS]")]
    link: Vec<String>,
    /// Its IPv4 address.
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<String>,
    /// Its IPv6 address.
    #[arg(long, value_name = "ADDRESS")]
    ip6: Option<String>,
    /// Its hardware address.
    #[arg(long, value_name = "ADDRESS")]
    mac_address: Option<String>,
    /// Its host name.
    #[arg(short = 'h', long, value_name = "NAME")]
    hostname: Option<String>,
    /// Its domain name.
    #[arg(long, value_name = "NAME")]
    domainname: Option<String>,
    /// One more line of /etc/hosts.
    #[arg(long, value_name = "HOST:ADDRESS")]
    add_host: Vec<String>,
    /// A DNS server.
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<String>,
    /// An option of its resolver.
    #[arg(long, visible_alias = "dns-opt", value_name = "OPTION")]
    dns_option: Vec<String>,
    /// A domain that its resolver searches.
    #[arg(long, value_name = "DOMAIN")]
    dns_search: Vec<String>,
    /// When to restart it.
    #[arg(long, value_name = "no|on-failure[:N]|always|unless-stopped", value_parser = restart)]
    restart: Option<(String, u64)>,
    /// Give it every right that the VM's root has.
    #[arg(long)]
    privileged: bool,
    /// Add a capability.
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    /// Drop a capability.
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// A security option.
    #[arg(long, value_name = "OPTION")]
    security_opt: Vec<String>,
    /// Its root file system can't be written to.
    #[arg(long)]
    read_only: bool,
    /// Run an init in it that reaps processes.
    #[arg(long)]
    init: bool,
    /// Give it a device of the VM.
    #[arg(long, value_name = "DEVICE")]
    device: Vec<String>,
    /// GPUs of the VM, which has none: the engine says so.
    #[arg(long, value_name = "all", value_parser = ["all"])]
    gpus: Option<String>,
    /// Share a process namespace: container:NAME, or host (the VM).
    #[arg(long, value_name = "NAMESPACE")]
    pid: Option<String>,
    /// Share an IPC namespace.
    #[arg(long, value_name = "NAMESPACE")]
    ipc: Option<String>,
    /// Share a UTS namespace.
    #[arg(long, value_name = "NAMESPACE")]
    uts: Option<String>,
    /// Share a user namespace.
    #[arg(long, value_name = "NAMESPACE")]
    userns: Option<String>,
    /// Set a kernel parameter of its namespaces.
    #[arg(long, value_name = "NAME=VALUE")]
    sysctl: Vec<String>,
    /// Limit a resource.
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = ulimit)]
    ulimit: Vec<Value>,
    /// Its part of the VM's memory.
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Memory that it gets back first.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory_reservation: Option<u64>,
    /// Memory and swap; -1 is no limit.
    #[arg(long, value_name = "SIZE", value_parser = signed_size, allow_hyphen_values = true)]
    memory_swap: Option<i64>,
    /// Size of /dev/shm.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    shm_size: Option<u64>,
    /// Its part of the VM's processors, e.g. 1.5.
    #[arg(long, value_name = "N", value_parser = cpus)]
    cpus: Option<u64>,
    /// Its weight among containers that want processors.
    #[arg(short, long, value_name = "N")]
    cpu_shares: Option<u64>,
    /// Run on these processors.
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Most processes; -1 is no limit.
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pids_limit: Option<i64>,
    /// Never end it for want of memory.
    #[arg(long)]
    oom_kill_disable: bool,
    /// How soon it is ended for want of memory, -1000 to 1000.
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = clap::value_parser!(i64).range(-1000..=1000))]
    oom_score_adj: Option<i64>,
    /// The cgroup above its own.
    #[arg(long, value_name = "PATH")]
    cgroup_parent: Option<String>,
    /// Its cgroup namespace: host or private.
    #[arg(long, value_name = "NAMESPACE")]
    cgroupns: Option<String>,
    /// How its output is kept.
    #[arg(long, value_name = "DRIVER")]
    log_driver: Option<String>,
    /// An option of that.
    #[arg(long, value_name = "NAME=VALUE")]
    log_opt: Vec<String>,
    /// An option of its storage.
    #[arg(long, value_name = "NAME=VALUE")]
    storage_opt: Vec<String>,
    /// The driver of its volumes.
    #[arg(long, value_name = "DRIVER")]
    volume_driver: Option<String>,
    /// The runtime.
    #[arg(long, value_name = "NAME")]
    runtime: Option<String>,
    /// Its isolation.
    #[arg(long, value_name = "TECHNOLOGY", hide = true)]
    isolation: Option<String>,
    /// The signal that stops it.
    #[arg(long, value_name = "SIGNAL")]
    stop_signal: Option<String>,
    /// Seconds from that to its end by force.
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    stop_timeout: Option<i64>,
    /// A command that tells whether it is healthy.
    #[arg(long, value_name = "COMMAND")]
    health_cmd: Option<String>,
    /// Time between two such commands.
    #[arg(long, value_name = "DURATION", value_parser = go_duration)]
    health_interval: Option<i64>,
    /// Failures until it is unhealthy.
    #[arg(long, value_name = "N")]
    health_retries: Option<u32>,
    /// Longest run of such a command.
    #[arg(long, value_name = "DURATION", value_parser = go_duration)]
    health_timeout: Option<i64>,
    /// Time that it has to start.
    #[arg(long, value_name = "DURATION", value_parser = go_duration)]
    health_start_period: Option<i64>,
    /// Time between two such commands while it starts.
    #[arg(long, value_name = "DURATION", value_parser = go_duration)]
    health_start_interval: Option<i64>,
    /// Don't look whether it is healthy.
    #[arg(long, conflicts_with_all = ["health_cmd", "health_interval", "health_retries", "health_timeout", "health_start_period"])]
    no_healthcheck: bool,
    /// The platform of its image, if it has several.
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<String>,
}

impl Options {
    /// Is this stream attached?
    pub(crate) fn attaches(&self, stream: &str) -> bool {
        match self.attach.as_slice() {
            [] => stream != "stdin" || self.interactive,
            named => named.iter().any(|name| name.eq_ignore_ascii_case(stream)),
        }
    }

    /// What the engine is asked for.
    pub(crate) fn body(&self, image: &str, command: &[String], attached: bool) -> Result<Value, String> {
        let mut ports = Ports::default();
        self.publish.iter().try_for_each(|text| ports.publish(text))?;
        self.expose.iter().try_for_each(|text| ports.expose(text))?;
        let mut mounts = Mounts::default();
        self.volume.iter().try_for_each(|text| mounts.volume(text))?;
        self.mount.iter().try_for_each(|text| mounts.mount(text))?;
        self.tmpfs.iter().try_for_each(|text| mounts.tmpfs(text))?;
        if self.rm && self.restart.as_ref().is_some_and(|(policy, _)| policy != "no") {
            return Err("--rm and --restart exclude each other".to_owned());
        }
        let streams = |stream: &str| attached && self.attaches(stream);
        let mut body = json!({
            "Image": image,
            "Cmd": if command.is_empty() { Value::Null } else { json!(command) },
            "Env": environment(&self.env_file, &self.env)?,
            "Labels": labels(&self.label_file, &self.label)?,
            "Tty": self.tty,
            "OpenStdin": self.interactive,
            "StdinOnce": self.interactive && streams("stdin"),
            "AttachStdin": streams("stdin"),
            "AttachStdout": streams("stdout"),
            "AttachStderr": streams("stderr"),
            "ExposedPorts": ports.exposed,
            "Volumes": mounts.anonymous,
            "HostConfig": self.host(ports.bindings, mounts.binds, mounts.mounts, mounts.tmpfs)?,
            "NetworkingConfig": self.networks(),
        });
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                body[key] = value;
            }
        };
        set("Hostname", self.hostname.as_deref().map(Value::from));
        set("Domainname", self.domainname.as_deref().map(Value::from));
        set("User", self.user.as_deref().map(Value::from));
        set("WorkingDir", self.workdir.as_deref().map(Value::from));
        set("MacAddress", self.mac_address.as_deref().map(Value::from));
        set("StopSignal", self.stop_signal.as_deref().map(Value::from));
        set("StopTimeout", self.stop_timeout.map(Value::from));
        set("Entrypoint", self.entrypoint.as_deref().map(|program| json!([program])));
        set("Healthcheck", self.health());
        Ok(body)
    }

    fn host(
        &self,
        bindings: Map<String, Value>,
        binds: Vec<String>,
        mounts: Vec<Value>,
        tmpfs: Map<String, Value>,
    ) -> Result<Value, String> {
        let mut host = json!({
            "Binds": or_null(&binds),
            "Mounts": mounts,
            "Tmpfs": tmpfs,
            "PortBindings": bindings,
            "PublishAllPorts": self.publish_all,
            "AutoRemove": self.rm,
            "Privileged": self.privileged,
            "ReadonlyRootfs": self.read_only,
            "CapAdd": or_null(&self.cap_add),
            "CapDrop": or_null(&self.cap_drop),
            "SecurityOpt": or_null(&self.security_opt),
            "GroupAdd": or_null(&self.group_add),
            "VolumesFrom": or_null(&self.volumes_from),
            "Links": self.link,
            "ExtraHosts": or_null(&self.add_host),
            "Dns": self.dns,
            "DnsOptions": self.dns_option,
            "DnsSearch": self.dns_search,
            "Sysctls": pairs(&self.sysctl),
            "StorageOpt": pairs(&self.storage_opt),
            "Annotations": pairs(&self.annotation),
            "Ulimits": self.ulimit,
            "BlkioWeightDevice": [],
            "BlkioDeviceReadBps": [],
            "BlkioDeviceWriteBps": [],
            "BlkioDeviceReadIOps": [],
            "BlkioDeviceWriteIOps": [],
            "NetworkMode": self.network.first().map_or("default", String::as_str),
            "Devices": self.device.iter().map(|device| device_of(device)).collect::<Result<Vec<_>, _>>()?,
            "LogConfig": {"Type": self.log_driver.as_deref().unwrap_or_default(), "Config": pairs(&self.log_opt)},
        });
        if let Some((rows, columns)) = crate::terminal::size().filter(|_| self.tty) {
            host["ConsoleSize"] = json!([rows, columns]);
        }
        let (policy, retries) = self.restart.clone().unwrap_or_else(|| ("no".to_owned(), 0));
        host["RestartPolicy"] = json!({ "Name": policy, "MaximumRetryCount": retries });
        self.limit(&mut host);
        Ok(host)
    }

    /// Sets what the engine chooses where nothing is said.
    fn limit(&self, host: &mut Value) {
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                host[key] = value;
            }
        };
        set(
            "DeviceRequests",
            self.gpus.as_ref().map(|_| json!([{ "Count": -1, "Capabilities": [["gpu"]], "Options": {} }])),
        );
        set("Init", self.init.then(|| true.into()));
        set("OomKillDisable", self.oom_kill_disable.then(|| true.into()));
        set("Memory", self.memory.map(Value::from));
        set("MemoryReservation", self.memory_reservation.map(Value::from));
        set("MemorySwap", self.memory_swap.map(Value::from));
        set("ShmSize", self.shm_size.map(Value::from));
        set("NanoCpus", self.cpus.map(Value::from));
        set("CpuShares", self.cpu_shares.map(Value::from));
        set("PidsLimit", self.pids_limit.map(Value::from));
        set("OomScoreAdj", self.oom_score_adj.map(Value::from));
        for (key, value) in [
            ("CpusetCpus", &self.cpuset_cpus),
            ("PidMode", &self.pid),
            ("IpcMode", &self.ipc),
            ("UTSMode", &self.uts),
            ("UsernsMode", &self.userns),
            ("CgroupParent", &self.cgroup_parent),
            ("CgroupnsMode", &self.cgroupns),
            ("VolumeDriver", &self.volume_driver),
            ("Runtime", &self.runtime),
            ("Isolation", &self.isolation),
        ] {
            set(key, value.as_deref().map(Value::from));
        }
    }

    /// The first network is the one that the container starts in, and the one that these options are about.
    fn networks(&self) -> Value {
        let mut first = Map::new();
        if !self.network_alias.is_empty() {
            first.insert("Aliases".to_owned(), json!(self.network_alias));
        }
        if !self.link.is_empty() {
            first.insert("Links".to_owned(), json!(self.link));
        }
        if self.ip.is_some() || self.ip6.is_some() {
            let addresses = json!({ "IPv4Address": self.ip, "IPv6Address": self.ip6 });
            first.insert("IPAMConfig".to_owned(), addresses);
        }
        if let Some(address) = &self.mac_address {
            first.insert("MacAddress".to_owned(), address.as_str().into());
        }
        let mut endpoints = Map::new();
        match self.network.split_first() {
            None if first.is_empty() => {}
            None => drop(endpoints.insert("default".to_owned(), first.into())),
            Some((name, others)) => {
                endpoints.insert(name.clone(), first.into());
                endpoints.extend(others.iter().map(|name| (name.clone(), json!({}))));
            }
        }
        json!({ "EndpointsConfig": endpoints })
    }

    fn health(&self) -> Option<Value> {
        if self.no_healthcheck {
            return Some(json!({ "Test": ["NONE"] }));
        }
        let mut health = Map::new();
        let mut set = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                health.insert(key.to_owned(), value);
            }
        };
        set("Test", self.health_cmd.as_deref().map(|command| json!(["CMD-SHELL", command])));
        set("Interval", self.health_interval.map(Value::from));
        set("Timeout", self.health_timeout.map(Value::from));
        set("StartPeriod", self.health_start_period.map(Value::from));
        set("StartInterval", self.health_start_interval.map(Value::from));
        set("Retries", self.health_retries.map(Value::from));
        if health.is_empty() { None } else { Some(Value::Object(health)) }
    }
}

/// What docker's client sends for an empty list of these: `inspect` shows the one and the other as they came.
fn or_null(list: &[String]) -> Value {
    if list.is_empty() { Value::Null } else { json!(list) }
}

/// `/dev/a[:/dev/b[:rwm]]`.
fn device_of(text: &str) -> Result<Value, String> {
    let mut parts = text.split(':');
    let (Some(host), inside, rights, None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(format!("{text:?} is no device"));
    };
    let (inside, rights) = match (inside, rights) {
        (Some(rights), None) if rights.bytes().all(|byte| b"rwm".contains(&byte)) => (host, rights),
        (inside, rights) => (inside.unwrap_or(host), rights.unwrap_or("rwm")),
    };
    if !host.starts_with('/') {
        return Err(format!("{text:?} is no device"));
    }
    Ok(json!({ "PathOnHost": host, "PathInContainer": inside, "CgroupPermissions": rights }))
}
