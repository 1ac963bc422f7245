//! What a client wants created: the body of its request, and what the engine may see of it.

use std::mem;

use bytes::BytesMut;
use serde_json::Value;
use tokio::net::unix::{ReadHalf, WriteHalf};

use crate::class::version_of;
use crate::client::{Broken, whole_body};
use crate::engine::{Engine, Lease};
use crate::head::RequestHead;
use crate::mounts::{Given, is};
use crate::publish::AnyPort;
use crate::{mounts, publish};

/// Numbers of the host that were chosen for a container. Those of one that isn't created are given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Chosen<'a, E: Engine> {
    engine: &'a E,
    numbers: Vec<u16>,
}

impl<'a, E: Engine> Chosen<'a, E> {
    pub(crate) const fn none(engine: &'a E) -> Self {
        Self { engine, numbers: Vec::new() }
    }

    fn choose(&mut self, wanted: AnyPort) -> Option<u16> {
        let number = self.engine.free_port(wanted);
        self.numbers.extend(number);
        number
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// They are a container's now.
    pub(crate) fn take(mut self) -> Vec<u16> {
        mem::take(&mut self.numbers)
    }
}

impl<E: Engine> Drop for Chosen<'_, E> {
    fn drop(&mut self) {
        if !self.numbers.is_empty() {
            self.engine.take_back(&self.numbers);
        }
    }
}

/// Objects of a wish whose names are read here, and without regard to case by the engine.
const READ: [&str; 5] = ["HostConfig", "Mounts", "BindOptions", "VolumeOptions", "DriverConfig"];

/// Reads a wish that an engine can't take for another. Engines read more than this: bytes that are no text, something
/// behind the end. What isn't understood here is never passed on, as it may hold a path.
fn understood(body: &[u8]) -> Result<Value, String> {
    let wish = serde_json::from_slice(body).map_err(|error| format!("invalid JSON: {error}"))?;
    match twice(&wish) {
        Some(name) => Err(format!("invalid JSON: {name:?} is there twice")),
        None => Ok(wish),
    }
}

/// A name that an object has twice, spelled in two ways: an engine would take both for one.
fn twice(read: &Value) -> Option<&str> {
    match read {
        Value::Array(items) => items.iter().find_map(twice),
        Value::Object(object) => {
            let names: Vec<_> = object.keys().collect();
            let again = names
                .iter()
                .enumerate()
                .find(|(place, name)| names[..*place].iter().any(|other| is(other, name)));
            let within = object.iter().filter(|(name, _)| READ.iter().any(|read| is(name, read)));
            again
                .map(|(_, name)| name.as_str())
                .or_else(|| within.filter_map(|(_, value)| twice(value)).next())
        }
        _ => None,
    }
}

/// A wish in which paths and ports of the host are settled.
#[derive(Debug)]
pub(crate) struct Wish<'a, E: Engine> {
    /// What the engine is sent.
    pub(crate) body: Vec<u8>,
    /// Paths of it that are others in the VM.
    pub(crate) given: Vec<Given>,
    /// Numbers in it that are the host's choice.
    pub(crate) chosen: Chosen<'a, E>,
    /// The same as `body`, if it wants all ports published that its image names: those are known when the engine is.
    publishes_all: Option<Value>,
    /// Containers whose volumes it wants. What these were given, it is given as well.
    volumes_from: Vec<String>,
}

impl<'a, E: Engine> Wish<'a, E> {
    /// Reads the body of a request that may name paths and ports of the host.
    ///
    /// # Errors
    /// A path or a port that can't be had; a body that is too long, or breaks off.
    pub(crate) async fn read(
        request: &RequestHead,
        engine: &'a E,
        reader: &mut ReadHalf<'_>,
        writer: &mut WriteHalf<'_>,
        pending: &mut BytesMut,
    ) -> Result<Self, Broken> {
        let body = whole_body(request, reader, writer, pending).await?;
        let mut chosen = Chosen::none(engine);
        // A wish for nothing is the engine's to complain about.
        if body.is_empty() {
            return Ok(Self {
                body,
                given: Vec::new(),
                chosen,
                publishes_all: None,
                volumes_from: Vec::new(),
            });
        }
        let refused = |why: String| Broken::refused(400, why);
        let mut wish = understood(&body).map_err(refused)?;
        let version = version_of(&request.target);
        let given = mounts::settle(&mut wish, &version, |bind| engine.mount(bind)).map_err(refused)?;
        let volumes_from = mounts::volumes_from(&wish).map_err(refused)?;
        publish::settle(&mut wish, engine.publish_address(), |wanted| chosen.choose(wanted))
            .map_err(refused)?;
        // As it was read here, so that the engine reads nothing else in it: not another of two values of one name.
        let body = wish.to_string().into_bytes();
        let publishes_all = publish::image_of_all(&wish).is_some().then_some(wish);
        Ok(Self { body, given, chosen, publishes_all, volumes_from })
    }

    /// Settles what is known when the engine is.
    ///
    /// # Errors
    /// A port that can't be had; it isn't known what the container would be given.
    pub(crate) async fn complete(&mut self, lease: &E::Lease) -> Result<(), Broken> {
        self.publish_all(lease).await?;
        for container in mem::take(&mut self.volumes_from) {
            self.given.extend(lease.given_to(&container).await.map_err(Broken::Refused)?);
        }
        Ok(())
    }

    /// Settles the ports that only the image names.
    ///
    /// # Errors
    /// One of them can't be had.
    async fn publish_all(&mut self, lease: &E::Lease) -> Result<(), Broken> {
        let Some(mut wish) = self.publishes_all.take() else { return Ok(()) };
        let Some(image) = publish::image_of_all(&wish) else { return Ok(()) };
        let exposed = lease.exposed_ports(image).await;
        let address = self.chosen.engine.publish_address();
        if publish::settle_all(&mut wish, &exposed, address, |wanted| self.chosen.choose(wanted))
            .map_err(|why| Broken::refused(400, why))?
        {
            self.body = wish.to_string().into_bytes();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_engine_would_read_otherwise_is_refused() {
        for body in [
            &br#"{"HostConfig":{"Binds":["/home/me:/x"]}}}"#[..],
            br#"{"HostConfig":{"Binds":["/home/me:/x"]}}]"#,
            br#"{"Labels":{"a":"\udcff"},"HostConfig":{"Binds":["/home/me:/x"]}}"#,
            b"{\"Labels\":{\"a\":\"\xff\"}}",
            br#"{"HostConfig":{},"hostconfig":{"Binds":["/home/me:/x"]}}"#,
            "{\"HostConfig\":{},\"Ho\u{17f}tConfig\":{}}".as_bytes(),
            "{\"HostConfig\":{\"Binds\":[],\"Bind\u{17f}\":[]}}".as_bytes(),
            br#"{"HostConfig":{"Mounts":[{"Type":"volume","type":"bind","Source":"/home/me"}]}}"#,
            br#"{"HostConfig":{"Mounts":[{"Type":"bind"}],"mounts":[{"Source":"/home/me"}]}}"#,
            br#"{"DriverOpts":{"type":"none","o":"bind"},"driveropts":{"device":"/home/me"}}"#,
            br#"{"HostConfig":{"Mounts":[{"VolumeOptions":{"DriverConfig":{"Options":{},"options":{}}}}]}}"#,
        ] {
            let why = understood(body).unwrap_err();
            assert!(why.starts_with("invalid JSON: "), "{}: {why}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn names_that_are_not_the_engines_may_be_spelled_in_two_ways() {
        let body =
            br#"{"Labels":{"a":"1","A":"2"},"HostConfig":{"Sysctls":{"b":"1","B":"2"}},"ExposedPorts":{}}"#;
        assert!(understood(body).is_ok());
    }

    #[test]
    fn of_two_values_of_one_name_the_engine_sees_the_one_that_was_looked_at() {
        let wish = understood(br#"{"HostConfig":{"Binds":["/home/me:/x"]},"HostConfig":{}}"#).unwrap();
        assert_eq!(wish.to_string(), r#"{"HostConfig":{}}"#);
    }
}
