//! What is mounted: folders of the host, named volumes, anonymous ones, memory.

use serde_json::{Map, Value, json};

/// What `-v`, `--mount` and `--tmpfs` come to in the engine's words.
#[derive(Debug, Default)]
pub(crate) struct Mounts {
    /// `Binds`.
    pub(crate) binds: Vec<String>,
    /// `Volumes`: the anonymous ones.
    pub(crate) anonymous: Map<String, Value>,
    /// `Mounts`.
    pub(crate) mounts: Vec<Value>,
    /// `Tmpfs`.
    pub(crate) tmpfs: Map<String, Value>,
}

impl Mounts {
    /// Adds what one `-v` asks for: `NAME:/path[:options]`, `FOLDER:/path[:options]` or `/path`.
    pub(crate) fn volume(&mut self, text: &str) -> Result<(), String> {
        match text.split_once(':') {
            None if text.starts_with('/') => {
                self.anonymous.insert(text.to_owned(), json!({}));
                Ok(())
            }
            None => Err(format!("{text:?} is no volume: give NAME:/path, or /path for one without a name")),
            Some((source, rest)) => {
                let target = rest.split(':').next().unwrap_or_default();
                absolute(target)?;
                let source = match folder(source)? {
                    Some(path) => path,
                    None => named(source).map(|()| source.to_owned())?,
                };
                self.binds.push(format!("{source}:{rest}"));
                Ok(())
            }
        }
    }

    /// Adds what one `--tmpfs` asks for: `/path[:options]`.
    pub(crate) fn tmpfs(&mut self, text: &str) -> Result<(), String> {
        let (path, options) = text.split_once(':').unwrap_or((text, ""));
        absolute(path)?;
        self.tmpfs.insert(path.to_owned(), options.into());
        Ok(())
    }

    /// Adds what one `--mount` asks for: `type=volume,src=NAME,dst=/path[,readonly]`, or
    /// `type=bind` with a folder or a file of the host.
    pub(crate) fn mount(&mut self, text: &str) -> Result<(), String> {
        let (mut kind, mut source, mut target, mut read_only) = ("volume", None, None, false);
        let (mut volume, mut tmpfs, mut bind) = (Map::new(), Map::new(), Map::new());
        for field in text.split(',') {
            let (key, value) = field.split_once('=').unwrap_or((field, ""));
            match key.to_ascii_lowercase().as_str() {
                "type" => kind = value,
                "source" | "src" => source = Some(value),
                "target" | "dst" | "destination" => target = Some(value),
                "readonly" | "ro" => {
                    read_only = match value {
                        "" | "true" | "1" => true,
                        "false" | "0" => false,
                        _ => return Err(format!("{value:?} is neither true nor false")),
                    };
                }
                "volume-nocopy" => {
                    volume.insert("NoCopy".to_owned(), (value != "false").into());
                }
                "tmpfs-size" => {
                    tmpfs.insert("SizeBytes".to_owned(), crate::value::size(value)?.into());
                }
                "tmpfs-mode" => {
                    let mode = u32::from_str_radix(value, 8).map_err(|_| format!("{value:?} is no mode"))?;
                    tmpfs.insert("Mode".to_owned(), mode.into());
                }
                "bind-propagation" => {
                    bind.insert("Propagation".to_owned(), value.into());
                }
                // Other engines' hint at how fresh a folder has to be. Here it always is.
                "consistency" => {}
                _ => return Err(format!("a mount has no {key:?}")),
            }
        }
        let target = target.ok_or("a mount needs a target: target=/path")?;
        absolute(target)?;
        let mut mount = json!({ "Type": kind, "Target": target, "ReadOnly": read_only });
        match (kind, source) {
            ("volume", source) => {
                if let Some(name) = source {
                    named(name)?;
                    mount["Source"] = name.into();
                }
                if !volume.is_empty() {
                    mount["VolumeOptions"] = Value::Object(volume);
                }
            }
            ("tmpfs", None) if tmpfs.is_empty() => {}
            ("tmpfs", None) => mount["TmpfsOptions"] = Value::Object(tmpfs),
            ("tmpfs", Some(_)) => return Err("memory has no source".to_owned()),
            ("bind", source) => {
                let source = source.ok_or("a folder of the host needs a source: source=/path")?;
                let path = folder(source)?.ok_or_else(|| not_absolute(source))?;
                mount["Source"] = path.into();
                if !bind.is_empty() {
                    mount["BindOptions"] = Value::Object(bind);
                }
            }
            _ => return Err(format!("there are no mounts of type {kind:?}: bind, volume and tmpfs are")),
        }
        self.mounts.push(mount);
        Ok(())
    }
}

fn named(name: &str) -> Result<(), String> {
    if name.contains('/') || name.starts_with('~') {
        return Err(not_absolute(name));
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if name.len() < 2 || !name.bytes().all(plain) || !name.as_bytes()[0].is_ascii_alphanumeric() {
        return Err(format!(
            "{name:?} is no name of a volume: it has letters, digits, '_', '.' and '-', two at least"
        ));
    }
    Ok(())
}

/// A path of the host: an absolute one, or one that begins with a dot, from where we are. `None`: it is none.
fn folder(source: &str) -> Result<Option<String>, String> {
    if source.starts_with('/') {
        return Ok(Some(source.to_owned()));
    }
    if !source.starts_with('.') {
        return Ok(None);
    }
    let here = std::env::current_dir().map_err(|error| format!("can't tell where {source:?} is: {error}"))?;
    let path = here.join(source).into_os_string().into_string();
    path.map(Some).map_err(|path| format!("{} is no UTF-8", path.display()))
}

fn not_absolute(path: &str) -> String {
    format!("{path:?} is no name of a volume and no path: a path begins with / or with ./")
}

fn absolute(path: &str) -> Result<(), String> {
    if path.starts_with('/') && path != "/" {
        Ok(())
    } else {
        Err(format!("{path:?} is no absolute path in a container"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_named_or_anonymous() {
        let mut mounts = Mounts::default();
        mounts.volume("things:/things:ro").unwrap();
        mounts.volume("/data").unwrap();
        mounts.tmpfs("/tmp:size=1m").unwrap();
        mounts.mount("type=volume,src=other,dst=/x,readonly").unwrap();
        mounts.mount("type=tmpfs,target=/y,tmpfs-size=1m").unwrap();
        assert_eq!(mounts.binds, ["things:/things:ro"]);
        assert!(mounts.anonymous.contains_key("/data"));
        assert_eq!(mounts.tmpfs["/tmp"], "size=1m");
        assert_eq!(mounts.mounts[0]["Source"], "other");
        assert_eq!(mounts.mounts[1]["TmpfsOptions"]["SizeBytes"], 1 << 20);
    }

    #[test]
    fn folders_of_the_host_are_named_by_paths_from_the_root_or_from_here() {
        let here = std::env::current_dir().unwrap();
        let mut mounts = Mounts::default();
        mounts.volume("/home/u:/x:ro").unwrap();
        mounts.volume("./a:/x").unwrap();
        mounts.volume(".:/x").unwrap();
        let from_here = |path: &str| format!("{}:/x", here.join(path).display());
        assert_eq!(mounts.binds, ["/home/u:/x:ro".to_owned(), from_here("./a"), from_here(".")]);
        mounts.mount("type=bind,src=/a,dst=/b,ro,consistency=cached,bind-propagation=rslave").unwrap();
        let bind = json!({ "Type": "bind", "Target": "/b", "ReadOnly": true, "Source": "/a",
            "BindOptions": { "Propagation": "rslave" } });
        assert_eq!(mounts.mounts, [bind]);
        for text in ["a", "a:/x", "things:x", "things:/", "things:", ":/x", "~/a:/x", "a/b:/x"] {
            assert!(Mounts::default().volume(text).is_err(), "{text}");
        }
        for text in ["type=bind,dst=/b", "type=bind,src=a,dst=/b", "type=bind,src=~/a,dst=/b"] {
            assert!(Mounts::default().mount(text).is_err(), "{text}");
        }
    }
}
