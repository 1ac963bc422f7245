//! Paths of the host in what clients ask to be created.
//!
//! An engine in a VM would bind a path of the *VM* that happens to have the name, and make it if there is none: a lie
//! that nobody hears of. So bodies of `POST /containers/create` and `POST /volumes/create` are read, and whoever serves
//! the session decides about each path in them.

use serde_json::Value;

/// Longest body that is looked at, in bytes. Those of real clients have a few KiB.
pub(crate) const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What becomes of a bind mount whose source is a path of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mount {
    /// In the VM the same path means the same.
    AsIs,
    /// In the VM it is this path.
    From(String),
    /// It can't be had, and this is what the client is told.
    Refused(String),
}

/// Asks `decide` about each path of the host in `wish`, and replaces those that are others in the VM. Was there any?
///
/// # Errors
/// The first refusal, in words.
pub(crate) fn settle(wish: &mut Value, decide: impl Fn(&str) -> Mount) -> Result<bool, String> {
    let mut changed = false;
    let mut paths = Vec::new();
    find(wish, &mut paths);
    for path in paths {
        let source = path.text.split_at(path.length).0;
        match decide(source) {
            Mount::AsIs => {}
            Mount::From(other) => {
                path.text.replace_range(..path.length, &other);
                changed = true;
            }
            Mount::Refused(why) => {
                return Err(format!("invalid mount config for type \"bind\": {source}: {why}"));
            }
        }
    }
    Ok(changed)
}

/// A text that begins with a path of the host.
struct HostPath<'a> {
    text: &'a mut String,
    length: usize,
}

impl<'a> HostPath<'a> {
    /// `None` unless it is an absolute path: a name is a volume's, and what is neither the engine refuses.
    fn new(text: &'a mut String, length: usize) -> Option<Self> {
        text.starts_with('/').then_some(Self { text, length })
    }
}

fn find<'a>(wish: &'a mut Value, paths: &mut Vec<HostPath<'a>>) {
    let Value::Object(fields) = wish else { return };
    for (name, value) in fields {
        if is(name, "HostConfig") {
            in_host_config(value, paths);
        } else if is(name, "DriverOpts") {
            in_driver_options(value, paths);
        }
    }
}

fn in_host_config<'a>(config: &'a mut Value, paths: &mut Vec<HostPath<'a>>) {
    let Value::Object(fields) = config else { return };
    for (name, value) in fields {
        let Value::Array(items) = value else { continue };
        for item in items {
            match item {
                // SOURCE:TARGET[:OPTIONS]; a target alone is an anonymous volume.
                Value::String(bind) if is(name, "Binds") => {
                    if let Some(end) = bind.find(':') {
                        paths.extend(HostPath::new(bind, end));
                    }
                }
                Value::Object(mount) if is(name, "Mounts") => in_mount(mount, paths),
                _ => {}
            }
        }
    }
}

fn in_mount<'a>(mount: &'a mut serde_json::Map<String, Value>, paths: &mut Vec<HostPath<'a>>) {
    let kind = mount.iter().find(|(name, _)| is(name, "Type")).and_then(|(_, kind)| kind.as_str());
    let is_bind = kind.is_some_and(|kind| kind.eq_ignore_ascii_case("bind"));
    for (name, value) in mount {
        match value {
            Value::String(source) if is_bind && is(name, "Source") => {
                let length = source.len();
                paths.extend(HostPath::new(source, length));
            }
            Value::Object(options) if is(name, "VolumeOptions") => {
                let drivers = options.iter_mut().filter(|(name, _)| is(name, "DriverConfig"));
                for (_, driver) in drivers {
                    let Value::Object(driver) = driver else { continue };
                    for (_, options) in driver.iter_mut().filter(|(name, _)| is(name, "Options")) {
                        in_driver_options(options, paths);
                    }
                }
            }
            _ => {}
        }
    }
}

/// A volume whose driver mounts a folder: the same lie by another door.
fn in_driver_options<'a>(options: &'a mut Value, paths: &mut Vec<HostPath<'a>>) {
    let Value::Object(options) = options else { return };
    let binds = options.iter().any(|(name, value)| {
        let words = value.as_str().unwrap_or_default();
        name == "o" && words.split(',').any(|word| matches!(word.trim(), "bind" | "rbind"))
    });
    for (name, value) in options {
        if let Value::String(device) = value
            && binds
            && name == "device"
        {
            let length = device.len();
            paths.extend(HostPath::new(device, length));
        }
    }
}

/// dockerd reads the names of fields without regard to case.
pub(crate) fn is(name: &str, field: &str) -> bool {
    name.eq_ignore_ascii_case(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(source: &str) -> Mount {
        match source {
            "/var/run/docker.sock" => Mount::AsIs,
            "/home/me/docker.sock" => Mount::From("/run/docker.sock".to_owned()),
            _ => Mount::Refused("not here".to_owned()),
        }
    }

    #[test]
    fn a_path_of_the_host_is_found_wherever_it_can_stand() {
        for body in [
            r#"{"HostConfig":{"Binds":["/home/me:/x"]}}"#,
            r#"{"HostConfig":{"Binds":["v:/v","/home/me:/x:ro,z"]}}"#,
            r#"{"hostconfig":{"binds":["/home/me:/x"]}}"#,
            r#"{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/home/me","Target":"/x"}]}}"#,
            r#"{"HostConfig":{"Mounts":[{"Target":"/x","Source":"/home/me","Type":"bind"}]}}"#,
            r#"{"HostConfig":{"Mounts":[{"Type":"volume","VolumeOptions":{"DriverConfig":{"Options":
                {"type":"none","o":"ro,bind","device":"/home/me"}}}}]}}"#,
            r#"{"Name":"v","DriverOpts":{"type":"none","o":"bind","device":"/home/me"}}"#,
        ] {
            let why = settle(&mut serde_json::from_str(body).unwrap(), decide).unwrap_err();
            assert_eq!(why, "invalid mount config for type \"bind\": /home/me: not here", "{body}");
        }
    }

    #[test]
    fn everything_else_passes_as_it_came() {
        for body in [
            r#"{"HostConfig":{"Binds":["name:/x","/anonymous"]},"Volumes":{"/y":{}}}"#,
            r#"{"HostConfig":{"Binds":["/var/run/docker.sock:/var/run/docker.sock"]}}"#,
            r#"{"HostConfig":{"Mounts":[{"Type":"volume","Source":"name","Target":"/x"},{"Type":"tmpfs"}]}}"#,
            r#"{"HostConfig":{"Binds":null,"Mounts":null}}"#,
            r#"{"Name":"v","DriverOpts":{"type":"nfs","o":"addr=10.0.0.1","device":":/export"}}"#,
            r#"{"Labels":{"HostConfig":"/home/me:/x"}}"#,
            "[]",
            "7",
        ] {
            assert_eq!(settle(&mut serde_json::from_str(body).unwrap(), decide), Ok(false), "{body}");
        }
    }

    #[test]
    fn a_path_that_is_another_in_the_vm_is_replaced_and_nothing_else() {
        let body = r#"{"HostConfig":{"Binds":["/home/me/docker.sock:/s:ro"]},"Image":"i","Memory":9007199254740993}"#;
        let mut wish: Value = serde_json::from_str(body).unwrap();
        assert_eq!(settle(&mut wish, decide), Ok(true));
        let expected: Value = serde_json::from_str(&body.replace("/home/me", "/run")).unwrap();
        assert_eq!(wish, expected);
    }
}
