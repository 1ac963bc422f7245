//! Paths of the host in what clients ask to be created.
//!
//! An engine in a VM would bind a path of the *VM* that happens to have the name, and make it if there is none: a lie
//! that nobody hears of. So bodies of `POST /containers/create` and `POST /volumes/create` are read, and whoever serves
//! the session decides about each path in them.

use serde_json::{Map, Value};

/// Longest body that is looked at, in bytes. Those of real clients have a few KiB.
pub(crate) const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A path of the host that a client wants in a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bind<'a> {
    /// The path.
    pub source: &'a str,
    /// In which words it is wanted.
    pub by: By,
    /// The container is not to write there.
    pub read_only: bool,
}

/// How a path of the host is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// `SOURCE:TARGET[:OPTIONS]`: a folder that is missing is made.
    Volume,
    /// A mount of the type `bind`.
    Mount {
        /// A folder that is missing is made.
        make: bool,
    },
    /// An option of a volume's driver.
    Driver,
}

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

/// A path of the host that was given to a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// What it is in the VM: [`Mount::From`].
    pub path: String,
    /// If it is missing when the container is started, it is made, a folder.
    pub make: bool,
}

/// Asks `decide` about each path of the host in `wish`, and replaces those that are others in the VM, which it gives.
///
/// # Errors
/// The first refusal, in words.
pub(crate) fn settle(wish: &mut Value, decide: impl FnMut(Bind<'_>) -> Mount) -> Result<Vec<Given>, String> {
    let mut settling = Settling { decide, given: Vec::new() };
    settling.wish(wish)?;
    Ok(settling.given)
}

struct Settling<F> {
    decide: F,
    given: Vec<Given>,
}

impl<F: FnMut(Bind<'_>) -> Mount> Settling<F> {
    fn wish(&mut self, wish: &mut Value) -> Result<(), String> {
        for (name, value) in wish.as_object_mut().into_iter().flatten() {
            if is(name, "HostConfig") {
                self.host_config(value)?;
            } else if is(name, "DriverOpts") {
                self.driver_options(value)?;
            }
        }
        Ok(())
    }

    fn host_config(&mut self, config: &mut Value) -> Result<(), String> {
        for (name, value) in config.as_object_mut().into_iter().flatten() {
            for item in value.as_array_mut().into_iter().flatten() {
                match item {
                    // SOURCE:TARGET[:OPTIONS]; a target alone is an anonymous volume.
                    Value::String(bind) if is(name, "Binds") => {
                        let Some(end) = bind.find(':') else { continue };
                        let options = bind.splitn(3, ':').nth(2).unwrap_or_default();
                        let read_only = options.split(',').any(|option| option == "ro");
                        self.path(bind, end, By::Volume, read_only)?;
                    }
                    Value::Object(mount) if is(name, "Mounts") => self.mount(mount)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn mount(&mut self, mount: &mut Map<String, Value>) -> Result<(), String> {
        let kind = field(mount, "Type").and_then(Value::as_str);
        let is_bind = kind.is_some_and(|kind| kind.eq_ignore_ascii_case("bind"));
        let read_only = field(mount, "ReadOnly").and_then(Value::as_bool).unwrap_or_default();
        let options = field(mount, "BindOptions").and_then(Value::as_object);
        let make = options.and_then(|options| field(options, "CreateMountpoint")).and_then(Value::as_bool);
        let make = make.unwrap_or_default();
        let mut is_another = false;
        for (name, value) in mount.iter_mut() {
            match value {
                Value::String(source) if is_bind && is(name, "Source") => {
                    let length = source.len();
                    is_another |= self.path(source, length, By::Mount { make }, read_only)?;
                }
                Value::Object(options) if is(name, "VolumeOptions") => {
                    for (_, driver) in options.iter_mut().filter(|(name, _)| is(name, "DriverConfig")) {
                        for (name, options) in driver.as_object_mut().into_iter().flatten() {
                            if is(name, "Options") {
                                self.driver_options(options)?;
                            }
                        }
                    }
                }
                _ => {}
            }
        }
        // Whether it is there was seen on the host. In the VM it is only while a container that has it runs.
        if is_another && !make {
            let name = mount.keys().find(|name| is(name, "BindOptions")).cloned();
            let options =
                mount.entry(name.unwrap_or_else(|| "BindOptions".to_owned())).or_insert(Value::Null);
            if !options.is_object() {
                *options = Value::Object(Map::new());
            }
            if let Some(options) = options.as_object_mut() {
                options.retain(|name, _| !is(name, "CreateMountpoint"));
                options.insert("CreateMountpoint".to_owned(), Value::Bool(true));
            }
        }
        Ok(())
    }

    /// A volume whose driver mounts a folder: the same lie by another door.
    fn driver_options(&mut self, options: &mut Value) -> Result<(), String> {
        let Value::Object(options) = options else { return Ok(()) };
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
                self.path(device, length, By::Driver, false)?;
            }
        }
        Ok(())
    }

    /// A text that begins with the source of a mount. Was it replaced? Only an absolute path is one of the host: a name is
    /// a volume's, and what is neither the engine refuses.
    fn path(&mut self, text: &mut String, length: usize, by: By, read_only: bool) -> Result<bool, String> {
        if !text.starts_with('/') {
            return Ok(false);
        }
        match (self.decide)(Bind { source: &text[..length], by, read_only }) {
            Mount::AsIs => Ok(false),
            Mount::From(other) => {
                text.replace_range(..length, &other);
                let make = matches!(by, By::Volume | By::Mount { make: true });
                self.given.push(Given { path: other, make });
                Ok(true)
            }
            Mount::Refused(why) => Err(format!("invalid mount config for type \"bind\": {why}")),
        }
    }
}

/// A field of an object.
pub(crate) fn field<'a>(object: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    object.iter().find(|(name, _)| is(name, field)).map(|(_, value)| value)
}

/// dockerd reads the names of fields without regard to case, as Unicode folds it: two letters beyond ASCII are two of it.
pub(crate) fn is(name: &str, field: &str) -> bool {
    let fold = |letter| match letter {
        'ſ' => 's',
        '\u{212a}' => 'k',
        letter => char::to_ascii_lowercase(&letter),
    };
    name.chars().map(fold).eq(field.chars().map(fold))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decide(bind: Bind<'_>) -> Mount {
        match (bind.source, bind.by) {
            ("/var/run/docker.sock", _) => Mount::AsIs,
            ("/home/me/docker.sock", _) => Mount::From("/run/docker.sock".to_owned()),
            ("/home/me/src", By::Volume | By::Mount { .. }) => {
                Mount::From(if bind.read_only { "/ro/src" } else { "/rw/src" }.to_owned())
            }
            (source, _) => Mount::Refused(format!("{source}: not here")),
        }
    }

    #[test]
    fn a_path_of_the_host_is_found_wherever_it_can_stand() {
        for body in [
            r#"{"HostConfig":{"Binds":["/home/me:/x"]}}"#,
            r#"{"HostConfig":{"Binds":["v:/v","/home/me:/x:ro,z"]}}"#,
            r#"{"hostconfig":{"binds":["/home/me:/x"]}}"#,
            r#"{"HoſtConfig":{"bindſ":["/home/me:/x"]}}"#,
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
            assert_eq!(settle(&mut serde_json::from_str(body).unwrap(), decide), Ok(Vec::new()), "{body}");
        }
    }

    #[test]
    fn a_path_that_is_another_in_the_vm_is_replaced_and_nothing_else() {
        let body = r#"{"HostConfig":{"Binds":["/home/me/docker.sock:/s:ro"]},"Image":"i","Memory":9007199254740993}"#;
        let mut wish: Value = serde_json::from_str(body).unwrap();
        let given = vec![Given { path: "/run/docker.sock".to_owned(), make: true }];
        assert_eq!(settle(&mut wish, decide), Ok(given));
        let expected: Value = serde_json::from_str(&body.replace("/home/me", "/run")).unwrap();
        assert_eq!(wish, expected);
    }

    #[test]
    fn what_is_wanted_of_a_path_is_told_and_a_mount_may_be_made_in_the_vm() {
        for (body, settled, make) in [
            (
                r#"{"HostConfig":{"Binds":["/home/me/src:/x"]}}"#,
                r#"{"HostConfig":{"Binds":["/rw/src:/x"]}}"#,
                true,
            ),
            (
                r#"{"HostConfig":{"Binds":["/home/me/src:/ro:z,ro"]}}"#,
                r#"{"HostConfig":{"Binds":["/ro/src:/ro:z,ro"]}}"#,
                true,
            ),
            (
                r#"{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/home/me/src","ReadOnly":true}]}}"#,
                r#"{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/ro/src","ReadOnly":true,
                    "BindOptions":{"CreateMountpoint":true}}]}}"#,
                false,
            ),
            (
                r#"{"HostConfig":{"mounts":[{"type":"bind","source":"/home/me/src","bindoptions":
                    {"Propagation":"rslave","createmountpoint":false}}]}}"#,
                r#"{"HostConfig":{"mounts":[{"type":"bind","source":"/rw/src","bindoptions":
                    {"Propagation":"rslave","CreateMountpoint":true}}]}}"#,
                false,
            ),
            (
                r#"{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/home/me/src","BindOptions":
                    {"CreateMountpoint":true}}]}}"#,
                r#"{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/rw/src","BindOptions":
                    {"CreateMountpoint":true}}]}}"#,
                true,
            ),
        ] {
            let mut wish: Value = serde_json::from_str(body).unwrap();
            let given = settle(&mut wish, decide).unwrap();
            assert_eq!(wish, serde_json::from_str::<Value>(settled).unwrap(), "{body}");
            assert_eq!((given.len(), given[0].make), (1, make), "{body}");
        }
    }
}
