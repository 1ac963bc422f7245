//! What a client wants created: the body of its request, and what the engine may see of it.

use std::mem;

use bytes::BytesMut;
use serde_json::Value;
use tokio::net::unix::{ReadHalf, WriteHalf};

use crate::client::{Broken, whole_body};
use crate::engine::{Engine, Lease};
use crate::head::RequestHead;
use crate::mounts::Given;
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
        // What isn't JSON is the engine's to complain about.
        let Ok(mut wish) = serde_json::from_slice(&body) else {
            return Ok(Self { body, given: Vec::new(), chosen, publishes_all: None });
        };
        let given =
            mounts::settle(&mut wish, |bind| engine.mount(bind)).map_err(|why| Broken::refused(400, why))?;
        let published = publish::settle(&mut wish, engine.publish_address(), |wanted| chosen.choose(wanted))
            .map_err(|why| Broken::refused(400, why))?;
        let changed = published || !given.is_empty();
        let body = if changed { wish.to_string().into_bytes() } else { body };
        let publishes_all = publish::image_of_all(&wish).is_some().then_some(wish);
        Ok(Self { body, given, chosen, publishes_all })
    }

    /// Settles the ports that only the image names.
    ///
    /// # Errors
    /// One of them can't be had.
    pub(crate) async fn publish_all(&mut self, lease: &E::Lease) -> Result<(), Broken> {
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
