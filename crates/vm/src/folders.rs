//! A device for shared folders, plugged into a spare root port while the VM runs.
//!
//! QEMU can't suspend a VM that has one (a vhost-user file system has state of its own), so it is there only while it is
//! needed. One whose other side died can't be unplugged either: the guest waits for answers that never come. It stays, and
//! the next takes the next port.

use std::path::Path;
use std::time::Duration;

use dormouse_qmp::{ChardevAdd, ChardevRemove, DeviceAdd, DeviceDel, ExecuteError, QomList};
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::device::SPARE_PORTS;
use crate::vm::Vm;

/// How long a guest may take to let a device go. Some 0.1 s are usual.
const UNPLUGGED_WITHIN: Duration = Duration::from_secs(20);

/// How often QEMU is asked whether it is gone.
const POLL_EVERY: Duration = Duration::from_millis(20);

/// Requests on their way between guest and host.
const QUEUE_SIZE: u32 = 1024;

/// Why a device isn't unplugged.
#[derive(Debug, thiserror::Error)]
pub enum UnplugError {
    /// QEMU refused, or is gone.
    #[error(transparent)]
    Execute(#[from] ExecuteError),
    /// The guest doesn't let it go.
    #[error("the guest did not let the device go within {} s", UNPLUGGED_WITHIN.as_secs())]
    Late,
}

/// Under what name a guest finds the folders of this spare port's device.
#[must_use]
pub fn folders_tag(port: usize) -> String {
    format!("dormouse{port}")
}

fn id(port: usize) -> String {
    format!("folders{port}")
}

impl Vm {
    /// Plugs a device into this one of [`SPARE_PORTS`], by its number. On the socket virtiofsd listens.
    ///
    /// # Errors
    /// See [`ExecuteError`]. Nothing is left plugged then.
    pub async fn plug_folders(&self, port: usize, socket: &Path) -> Result<(), ExecuteError> {
        let id = id(port);
        let address = json!({ "type": "unix", "data": { "path": socket } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        self.execute(ChardevAdd { id: id.clone(), backend }).await?;
        let properties = json!({ "chardev": id, "tag": folders_tag(port), "queue-size": QUEUE_SIZE });
        let device = DeviceAdd {
            driver: "vhost-user-fs-pci".to_owned(),
            id: id.clone(),
            bus: SPARE_PORTS.get(port).copied().unwrap_or_default().to_owned(),
            properties: properties.as_object().cloned().unwrap_or_default(),
        };
        let plugged = self.execute(device).await.map(drop);
        if plugged.is_err() {
            let _ = self.execute(ChardevRemove { id }).await;
        }
        plugged
    }

    /// Unplugs it, and waits until it is gone. The guest has let go of what was in it.
    ///
    /// # Errors
    /// See [`UnplugError`].
    pub async fn unplug_folders(&self, port: usize) -> Result<(), UnplugError> {
        let deadline = Instant::now() + UNPLUGGED_WITHIN;
        self.execute(DeviceDel { id: id(port) }).await?;
        loop {
            // A device that is gone from the list may still have its connection for a moment.
            if !self.folders_plugged().await?.contains(&port) {
                match self.execute(ChardevRemove { id: id(port) }).await {
                    Err(ExecuteError::Refused { .. }) => {}
                    removed => return Ok(removed.map(drop)?),
                }
            }
            if Instant::now() >= deadline {
                return Err(UnplugError::Late);
            }
            sleep(POLL_EVERY).await;
        }
    }

    /// Numbers of the spare ports that have such a device.
    ///
    /// # Errors
    /// See [`ExecuteError`].
    pub async fn folders_plugged(&self) -> Result<Vec<usize>, ExecuteError> {
        let devices = self.execute(QomList { path: "/machine/peripheral".to_owned() }).await?;
        let plugged = |port: &usize| devices.iter().any(|device| device.name == id(*port));
        Ok((0..SPARE_PORTS.len()).filter(plugged).collect())
    }
}
