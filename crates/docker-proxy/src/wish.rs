//! What a client wants created: the body of its request, and what the engine may see of it.

use serde_json::Value;
use tokio::net::unix::{ReadHalf, WriteHalf};

use bytes::BytesMut;

use crate::client::{Broken, whole_body};
use crate::engine::{Engine, Lease};
use crate::head::RequestHead;
use crate::mounts::Given;
use crate::{mounts, publish};

/// A wish in which paths and ports of the host are settled.
#[derive(Debug)]
pub(crate) struct Wish {
    /// What the engine is sent.
    pub(crate) body: Vec<u8>,
    /// Paths of it that are others in the VM.
    pub(crate) given: Vec<Given>,
    /// The same as `body`, if it wants all ports published that its image names: those are known when the engine is.
    publishes_all: Option<Value>,
}

impl Wish {
    /// Reads the body of a request that may name paths and ports of the host.
    ///
    /// # Errors
    /// A path or a port that can't be had; a body that is too long, or breaks off.
    pub(crate) async fn read<E: Engine>(
        request: &RequestHead,
        engine: &E,
        reader: &mut ReadHalf<'_>,
        writer: &mut WriteHalf<'_>,
        pending: &mut BytesMut,
    ) -> Result<Self, Broken> {
        let body = whole_body(request, reader, writer, pending).await?;
        // What isn't JSON is the engine's to complain about.
        let Ok(mut wish) = serde_json::from_slice(&body) else {
            return Ok(Self { body, given: Vec::new(), publishes_all: None });
        };
        let given =
            mounts::settle(&mut wish, |bind| engine.mount(bind)).map_err(|why| Broken::refused(400, why))?;
        let published =
            publish::settle(&mut wish, engine.publish_address(), |wanted| engine.free_port(wanted))
                .map_err(|why| Broken::refused(400, why))?;
        let changed = published || !given.is_empty();
        let body = if changed { wish.to_string().into_bytes() } else { body };
        let publishes_all = publish::image_of_all(&wish).is_some().then_some(wish);
        Ok(Self { body, given, publishes_all })
    }

    /// Settles the ports that only the image names.
    ///
    /// # Errors
    /// One of them can't be had.
    pub(crate) async fn publish_all<E: Engine>(
        &mut self,
        engine: &E,
        lease: &E::Lease,
    ) -> Result<(), Broken> {
        let Some(mut wish) = self.publishes_all.take() else { return Ok(()) };
        let Some(image) = publish::image_of_all(&wish) else { return Ok(()) };
        let exposed = lease.exposed_ports(image).await;
        if publish::settle_all(&mut wish, &exposed, engine.publish_address(), |wanted| {
            engine.free_port(wanted)
        })
        .map_err(|why| Broken::refused(400, why))?
        {
            self.body = wish.to_string().into_bytes();
        }
        Ok(())
    }
}
