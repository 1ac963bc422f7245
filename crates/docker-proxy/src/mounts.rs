//! Paths of the host in what clients ask to be created.
//!
//! An engine in a VM would bind a path of the *VM* that happens to have the name, and make it if there is none: a lie
//! that nobody hears of. So bodies of `POST /containers/create` and `POST /volumes/create` are read, and whoever serves
//! the session decides about each path in them.

use std::collections::BTreeSet;
use std::mem;

use serde_json::{Map, Value};

use crate::class::is_container_name;

/// Longest body that is looked at, in bytes. Those of real clients have a few KiB.
pub(crate) const BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Containers whose volumes one container can have: the engine is asked about each.
const VOLUMES_FROM_MAX: usize = 64;

/// The first version of the API in which an engine reads `CreateMountpoint`. Of older clients it wants that the source of
/// a mount is there when the container is created.
const READS_CREATE_MOUNTPOINT: [u32; 2] = [1, 42];

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
/// `version` is the request's, such as `/v1.45`; empty is the newest.
///
/// # Errors
/// The first refusal, in words.
pub(crate) fn settle(
    wish: &mut Value,
    version: &str,
    decide: impl FnMut(Bind<'_>) -> Mount,
) -> Result<Vec<Given>, String> {
    let mut settling = Settling { decide, makes: reads_create_mountpoint(version), given: Vec::new() };
    settling.wish(wish)?;
    Ok(settling.given)
}

/// Does an engine read `CreateMountpoint` in requests of this version?
fn reads_create_mountpoint(version: &str) -> bool {
    let Some(version) = version.strip_prefix("/v") else { return true };
    // As the engine compares them: what is no number is 0.
    let numbers: Vec<u32> = version.split('.').map(|number| number.parse().unwrap_or_default()).collect();
    numbers.as_slice() >= READS_CREATE_MOUNTPOINT.as_slice()
}

/// The containers whose volumes a container is to have, as its client names them. A name that no container can have is the
/// engine's to complain about.
///
/// # Errors
/// There are too many, in words.
pub(crate) fn volumes_from(wish: &Value) -> Result<Vec<String>, String> {
    let config = wish.as_object().and_then(|wish| field(wish, "HostConfig")).and_then(Value::as_object);
    let listed = config.and_then(|config| field(config, "VolumesFrom")).and_then(Value::as_array);
    // NAME[:OPTIONS]; `/web` is `web`.
    let names = listed.into_iter().flatten().filter_map(Value::as_str).map(|from| {
        let name = from.split_once(':').map_or(from, |(name, _)| name);
        name.strip_prefix('/').unwrap_or(name)
    });
    let names: BTreeSet<&str> = names.filter(|name| is_container_name(name)).collect();
    match names.len() {
        0..=VOLUMES_FROM_MAX => Ok(names.into_iter().map(str::to_owned).collect()),
        count => Err(format!(
            "{count} containers are more than the {VOLUMES_FROM_MAX} whose volumes one container can have"
        )),
    }
}

struct Settling<F> {
    decide: F,
    /// What is bound by a mount may be missing in the VM until the container is started.
    makes: bool,
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
        let Value::Object(config) = config else { return Ok(()) };
        let mut moved = Vec::new();
        for (name, value) in config.iter_mut() {
            let Value::Array(items) = value else { continue };
            if is(name, "Binds") {
                self.binds(items)?;
            } else if is(name, "Mounts") {
                moved.extend(self.mounts(items)?);
            }
        }
        if !moved.is_empty() {
            match field_or_null(config, "Binds") {
                Value::Array(binds) => binds.extend(moved),
                none => *none = Value::Array(moved),
            }
        }
        Ok(())
    }

    /// `SOURCE:TARGET[:OPTIONS]` each; a target alone is an anonymous volume.
    fn binds(&mut self, binds: &mut [Value]) -> Result<(), String> {
        for bind in binds {
            let Value::String(bind) = bind else { continue };
            let Some(end) = bind.find(':') else { continue };
            let options = bind.splitn(3, ':').nth(2).unwrap_or_default();
            let read_only = options.split(',').any(|option| option == "ro");
            self.path(bind, end, By::Volume, read_only)?;
        }
        Ok(())
    }

    /// Takes out what can't stay a mount, and gives it as `Binds` say it.
    fn mounts(&mut self, mounts: &mut Vec<Value>) -> Result<Vec<Value>, String> {
        let (mut kept, mut moved) = (Vec::new(), Vec::new());
        for mut mount in mem::take(mounts) {
            let bind = match &mut mount {
                Value::Object(mount) => self.mount(mount)?,
                _ => None,
            };
            match bind {
                Some(bind) => moved.push(Value::String(bind)),
                None => kept.push(mount),
            }
        }
        *mounts = kept;
        Ok(moved)
    }

    /// What one of `Binds` says that has to take this one's place, if one has to.
    fn mount(&mut self, mount: &mut Map<String, Value>) -> Result<Option<String>, String> {
        let is_bind = text(mount, "Type").eq_ignore_ascii_case("bind");
        let read_only = is_true(mount, "ReadOnly");
        let make = self.makes && bind_options(mount).is_some_and(|it| is_true(it, "CreateMountpoint"));
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
        if !is_another || make {
            return Ok(None);
        }
        if !self.makes {
            return as_bind(mount).map(Some);
        }
        create_mountpoint(mount);
        Ok(None)
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
            Mount::Refused(why) => Err(refused(&why)),
        }
    }
}

/// In Docker's words.
fn refused(why: &str) -> String {
    format!("invalid mount config for type \"bind\": {why}")
}

/// Tells the engine that the source of this mount may be missing when the container is created.
fn create_mountpoint(mount: &mut Map<String, Value>) {
    let options = field_or_null(mount, "BindOptions");
    if !options.is_object() {
        *options = Value::Object(Map::new());
    }
    if let Some(options) = options.as_object_mut() {
        options.retain(|name, _| !is(name, "CreateMountpoint"));
        options.insert("CreateMountpoint".to_owned(), Value::Bool(true));
    }
}

/// A bind mount as `Binds` say it, whose sources may be missing when the container is created. Its consistency means nothing
/// to an engine on Linux.
///
/// # Errors
/// It wants what `Binds` can't say, in words.
fn as_bind(mount: &Map<String, Value>) -> Result<String, String> {
    let (source, target) = (text(mount, "Source"), text(mount, "Target"));
    let [major, minor] = READS_CREATE_MOUNTPOINT;
    let refuse = |what: &str| {
        let words = "a folder of the host can only be mounted by a client of the API's version";
        Err(refused(&format!("{target}: {what}, {words} {major}.{minor} or newer")))
    };
    if target.contains(':') {
        return refuse("at a path with a colon");
    }
    let options = bind_options(mount);
    if options.is_some_and(|options| is_true(options, "NonRecursive")) {
        return refuse("non-recursively");
    }
    let read_only = if is_true(mount, "ReadOnly") { "ro" } else { "" };
    let propagation = options.map_or("", |options| text(options, "Propagation"));
    let words: Vec<&str> = [read_only, propagation].into_iter().filter(|word| !word.is_empty()).collect();
    let colon = if words.is_empty() { "" } else { ":" };
    Ok(format!("{source}:{target}{colon}{}", words.join(",")))
}

fn bind_options(mount: &Map<String, Value>) -> Option<&Map<String, Value>> {
    field(mount, "BindOptions").and_then(Value::as_object)
}

/// A field of an object.
pub(crate) fn field<'a>(object: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    object.iter().find(|(name, _)| is(name, field)).map(|(_, value)| value)
}

/// A field of an object, which is put there, `null`, if it isn't.
fn field_or_null<'a>(object: &'a mut Map<String, Value>, field: &str) -> &'a mut Value {
    let name = object.keys().find(|name| is(name, field)).cloned();
    object.entry(name.unwrap_or_else(|| field.to_owned())).or_insert(Value::Null)
}

/// The text of a field; empty if it has none.
fn text<'a>(object: &'a Map<String, Value>, name: &str) -> &'a str {
    field(object, name).and_then(Value::as_str).unwrap_or_default()
}

fn is_true(object: &Map<String, Value>, name: &str) -> bool {
    field(object, name).and_then(Value::as_bool).unwrap_or_default()
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
            let why = settle(&mut serde_json::from_str(body).unwrap(), "", decide).unwrap_err();
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
            assert_eq!(
                settle(&mut serde_json::from_str(body).unwrap(), "", decide),
                Ok(Vec::new()),
                "{body}"
            );
        }
    }

    #[test]
    fn a_path_that_is_another_in_the_vm_is_replaced_and_nothing_else() {
        let body = r#"{"HostConfig":{"Binds":["/home/me/docker.sock:/s:ro"]},"Image":"i","Memory":9007199254740993}"#;
        let mut wish: Value = serde_json::from_str(body).unwrap();
        let given = vec![Given { path: "/run/docker.sock".to_owned(), make: true }];
        assert_eq!(settle(&mut wish, "", decide), Ok(given));
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
            let given = settle(&mut wish, "", decide).unwrap();
            assert_eq!(wish, serde_json::from_str::<Value>(settled).unwrap(), "{body}");
            assert_eq!((given.len(), given[0].make), (1, make), "{body}");
        }
    }

    #[test]
    fn an_old_clients_mount_of_a_folder_is_a_bind_to_the_engine() {
        for (body, settled) in [
            (
                r#"{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/home/me/src","Target":"/x"}]}}"#,
                r#"{"HostConfig":{"Mounts":[],"Binds":["/rw/src:/x"]}}"#,
            ),
            (
                r#"{"HostConfig":{"binds":["v:/v"],"Mounts":[{"Type":"volume","Source":"w","Target":"/w"},
                    {"type":"bind","source":"/home/me/src","target":"/x","readonly":true,"Consistency":"cached",
                    "bindoptions":{"propagation":"rslave","NonRecursive":false,"CreateMountpoint":true}}]}}"#,
                r#"{"HostConfig":{"binds":["v:/v","/ro/src:/x:ro,rslave"],
                    "Mounts":[{"Type":"volume","Source":"w","Target":"/w"}]}}"#,
            ),
            (
                r#"{"HostConfig":{"Binds":null,"Mounts":[{"Type":"bind","Source":"/home/me/src","Target":"/x",
                    "BindOptions":{"Propagation":"shared"}}]}}"#,
                r#"{"HostConfig":{"Binds":["/rw/src:/x:shared"],"Mounts":[]}}"#,
            ),
        ] {
            for version in ["/v1.41", "/v1.24", "/v1", "/v1.4.9"] {
                let mut wish: Value = serde_json::from_str(body).unwrap();
                let given = settle(&mut wish, version, decide).unwrap();
                assert_eq!(wish, serde_json::from_str::<Value>(settled).unwrap(), "{version} {body}");
                assert_eq!((given.len(), given[0].make), (1, false), "{version} {body}");
            }
        }
    }

    #[test]
    fn a_mount_stays_one_if_its_client_is_new_or_its_path_the_same_in_the_vm() {
        let mount = |source: &str| {
            let mount = serde_json::json!({ "Type": "bind", "Source": source, "Target": "/x" });
            serde_json::json!({ "HostConfig": { "Mounts": [mount] } })
        };
        for version in ["", "/v1.42", "/v1.100", "/v2"] {
            let mut wish = mount("/home/me/src");
            settle(&mut wish, version, decide).unwrap();
            let settled = &wish["HostConfig"]["Mounts"][0];
            assert_eq!(settled["BindOptions"]["CreateMountpoint"], true, "{version}: {wish}");
            assert!(wish["HostConfig"].get("Binds").is_none(), "{version}: {wish}");
        }
        let socket = mount("/var/run/docker.sock");
        let mut wish = socket.clone();
        assert_eq!(settle(&mut wish, "/v1.41", decide), Ok(Vec::new()));
        assert_eq!(wish, socket);
    }

    #[test]
    fn an_old_client_is_told_what_of_a_mount_it_cannot_have() {
        for (more, why) in [
            (r#""Target":"/x:y""#, "/x:y: at a path with a colon, "),
            (r#""Target":"/x","BindOptions":{"NonRecursive":true}"#, "/x: non-recursively, "),
        ] {
            let mount = format!(r#"{{"Type":"bind","Source":"/home/me/src",{more}}}"#);
            let body = format!(r#"{{"HostConfig":{{"Mounts":[{mount}]}}}}"#);
            let told = settle(&mut serde_json::from_str(&body).unwrap(), "/v1.41", decide).unwrap_err();
            let expected = format!("invalid mount config for type \"bind\": {why}");
            assert!(told.starts_with(&expected) && told.ends_with(" 1.42 or newer"), "{body}: {told}");
            assert!(settle(&mut serde_json::from_str(&body).unwrap(), "/v1.42", decide).is_ok(), "{body}");
        }
    }

    #[test]
    fn whose_volumes_a_container_is_to_have_is_known_by_name() {
        for (body, names) in [
            (r#"{"HostConfig":{"VolumesFrom":["b:ro","/a","b","web/db:rw,z"]}}"#, vec!["a", "b", "web/db"]),
            (r#"{"hostconfig":{"volumesfrom":["a b","",":ro","a?x","ab12"]}}"#, vec!["ab12"]),
            (r#"{"HostConfig":{"VolumesFrom":null}}"#, vec![]),
            (r#"{"VolumesFrom":["a"]}"#, vec![]),
            ("[]", vec![]),
        ] {
            let wish: Value = serde_json::from_str(body).unwrap();
            assert_eq!(volumes_from(&wish).unwrap(), names, "{body}");
        }
        let of = |count: usize| {
            let names: Vec<_> = (0..count).map(|number| format!("c{number}")).collect();
            volumes_from(&serde_json::json!({ "HostConfig": { "VolumesFrom": names } }))
        };
        assert_eq!(of(VOLUMES_FROM_MAX).unwrap().len(), VOLUMES_FROM_MAX);
        assert!(of(VOLUMES_FROM_MAX + 1).unwrap_err().contains("65 containers are more than the 64 "));
    }
}
