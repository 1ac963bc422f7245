//! The device that folders are shared by: at most one that works in each VM.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dormouse_folders::{GET_VIRTIOFSD, Keeper, KeeperStart, Share, find_virtiofsd};
use dormouse_mux::Agent;
use dormouse_vm::{SPARE_PORTS, Vm, folders_tag};
use tokio::task::JoinHandle;

use super::{Folders, guest, told};
use crate::owner::HeldLease;

/// This program, also when its file was replaced since it was started, as an upgrade does it.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// The device of a VM.
#[derive(Debug, Default)]
pub(super) struct Device {
    generation: u64,
    /// Ports that have a device which is mounted, in the order of their mounts: each over the one before.
    mounted: Vec<usize>,
    /// Ports whose devices the guest doesn't let go.
    stuck: Vec<usize>,
    /// The one that works: the last one mounted, if its virtiofsd didn't die.
    plugged: Option<Plugged>,
}

#[derive(Debug)]
struct Plugged {
    port: usize,
    keeper: Keeper,
    shares: BTreeSet<Share>,
    hold: Option<HeldLease>,
    /// Hears of the end of what is shared.
    watching: JoinHandle<()>,
    /// Tells watchers in the guest what changes.
    telling: JoinHandle<()>,
}

impl Drop for Plugged {
    fn drop(&mut self) {
        self.watching.abort();
        self.telling.abort();
    }
}

impl Device {
    /// Forgets an earlier VM's, and looks what an earlier host has plugged into this one.
    pub(super) async fn belong_to(
        &mut self,
        vm: &Arc<Vm>,
        agent: &Agent,
        folders: &Folders,
    ) -> Result<(), String> {
        let generation = vm.record().generation;
        if self.generation == generation {
            return Ok(());
        }
        *self = Self { generation, ..Self::default() };
        let ports = vm.folders_plugged().await.map_err(|error| {
            // Asked again by whoever comes next.
            self.generation = 0;
            error.to_string()
        })?;
        self.mounted = ports;
        let Some(port) = self.mounted.last().copied() else { return Ok(()) };
        let found = async {
            let mut keeper = Keeper::connect(&control(vm, port)).await?;
            let shares = keeper.shares().await?.into_iter().collect();
            Ok::<_, dormouse_folders::LinkError>((keeper, shares))
        };
        match found.await {
            Ok((keeper, shares)) => self.take(vm, port, keeper, shares, agent, folders).await,
            // It has died.
            Err(_) => Ok(()),
        }
    }

    /// Plugs one in, unless there is one.
    pub(super) async fn plug(
        &mut self,
        vm: &Arc<Vm>,
        agent: &Agent,
        folders: &Folders,
    ) -> Result<(), String> {
        if self.plugged.is_some() {
            return Ok(());
        }
        // Above those that died, so that a later host finds the order of their mounts by their numbers.
        let used = self.mounted.iter().chain(&self.stuck).max();
        let port = used.map_or(0, |used| used + 1);
        if port >= SPARE_PORTS.len() {
            return Err("too many devices for folders have died in this VM: stop it with `dorm session stop`, and it is \
                        started anew"
                .to_owned());
        }
        let runtime = vm.runtime_dir();
        let socket = runtime.join(format!("{}-folders{port}", self.generation));
        let qemu = vm.record().process.map(|process| process.pid).ok_or("the VM has no process")?;
        let start = KeeperStart {
            program: Path::new(THIS_PROGRAM),
            virtiofsd: &find_virtiofsd().ok_or_else(|| format!("virtiofsd not found: {GET_VIRTIOFSD}"))?,
            folder: &runtime.join(format!("folders{port}")),
            control: &control(vm, port),
            device: &socket,
            vm: qemu,
        };
        let mut keeper = Keeper::start(start).await.map_err(|error| error.to_string())?;
        if let Err(error) = vm.plug_folders(port, &socket).await {
            let _ = keeper.quit().await;
            return Err(format!("the VM takes no device for folders: {error}"));
        }
        if let Err(error) = guest::mount(agent, &folders_tag(port)).await {
            if vm.unplug_folders(port).await.is_err() {
                self.stuck.push(port);
            }
            let _ = keeper.quit().await;
            return Err(error);
        }
        self.mounted.push(port);
        self.take(vm, port, keeper, BTreeSet::new(), agent, folders).await
    }

    async fn take(
        &mut self,
        vm: &Arc<Vm>,
        port: usize,
        keeper: Keeper,
        shares: BTreeSet<Share>,
        agent: &Agent,
        folders: &Folders,
    ) -> Result<(), String> {
        let other = Keeper::connect(&control(vm, port)).await.map_err(|error| error.to_string())?;
        let (generation, folders) = (self.generation, folders.clone());
        let telling = tokio::spawn(told::tell(agent.clone(), control(vm, port), folders.clone(), generation));
        let watching = tokio::spawn(async move {
            let why = other.ended().await;
            // A task of its own: it ends this one by what it does.
            tokio::spawn(async move { folders.lost(generation, port, why).await });
        });
        self.plugged = Some(Plugged { port, keeper, shares, hold: None, watching, telling });
        Ok(())
    }

    /// Shares it. A device is plugged in.
    pub(super) async fn share(&mut self, share: &Share) -> Result<(), String> {
        let plugged = self.plugged.as_mut().ok_or("there is no device for folders")?;
        if !plugged.shares.contains(share) {
            let shared = plugged.keeper.share(share).await;
            shared.map_err(|error| format!("{}: {error}", share.path.display()))?;
            plugged.shares.insert(share.clone());
            // What it says is out of date.
            plugged.hold = None;
        }
        Ok(())
    }

    /// Takes all others back.
    pub(super) async fn keep_only(&mut self, wanted: &BTreeSet<Share>) -> Result<(), String> {
        let Some(plugged) = &mut self.plugged else { return Ok(()) };
        let surplus: Vec<_> = plugged.shares.difference(wanted).cloned().collect();
        for share in surplus {
            plugged.keeper.take_back(&share).await.map_err(|error| error.to_string())?;
            plugged.shares.remove(&share);
            plugged.hold = None;
        }
        Ok(())
    }

    /// Unplugs it, and those that have died. Nothing is shared any more.
    pub(super) async fn unplug(&mut self, vm: &Vm, agent: &Agent) -> Result<(), String> {
        while let Some(port) = self.mounted.last().copied() {
            guest::unmount(agent, &folders_tag(port)).await?;
            self.mounted.pop();
            let plugged = self.plugged.take_if(|plugged| plugged.port == port);
            if let Some(plugged) = &plugged {
                plugged.watching.abort();
            }
            // virtiofsd ends by itself when QEMU hangs up, and the keeper with it.
            let unplugged = vm.unplug_folders(port).await;
            if let Err(error) = unplugged {
                self.stuck.push(port);
                return Err(error.to_string());
            }
            if let Some(mut plugged) = plugged {
                let _ = plugged.keeper.quit().await;
            }
        }
        Ok(())
    }

    /// Whether it was this device that is lost; then it is known from now on.
    pub(super) fn is_lost(&mut self, generation: u64, port: usize) -> bool {
        self.plugged.take_if(|plugged| self.generation == generation && plugged.port == port).is_some()
    }

    /// What it shares.
    pub(super) fn shares(&self) -> impl Iterator<Item = &Share> {
        self.plugged.iter().flat_map(|plugged| &plugged.shares)
    }

    /// Whether the VM has any.
    pub(super) fn is_plugged(&self) -> bool {
        !self.mounted.is_empty()
    }

    /// Whether the VM has one that it doesn't let go.
    pub(super) fn is_broken(&self) -> bool {
        !self.stuck.is_empty()
    }

    pub(super) fn is_held(&self) -> bool {
        self.plugged.as_ref().is_some_and(|plugged| plugged.hold.is_some())
    }

    /// Keeps the VM awake for as long as something is shared.
    pub(super) fn hold(&mut self, hold: Option<HeldLease>) {
        if let Some(plugged) = &mut self.plugged {
            plugged.hold = hold;
        }
    }
}

/// Where the keeper of a VM's device listens for its host.
fn control(vm: &Vm, port: usize) -> PathBuf {
    vm.runtime_dir().join(format!("{}-keeper{port}", vm.record().generation))
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::{env, fs};

    use super::*;

    /// In the program of this name that removes its own file.
    const COPY: &str = "DORM_TEST_COPY";

    #[test]
    fn a_program_whose_file_is_gone_can_still_be_started_by_itself() {
        let program = env::current_exe().unwrap();
        if env::var_os(COPY).is_some() {
            fs::remove_file(program).unwrap();
            assert!(Command::new(THIS_PROGRAM).arg("--list").output().unwrap().status.success());
            return;
        }
        let folder = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let copy = folder.path().join("copy");
        fs::hard_link(program, &copy).unwrap();
        let name = "a_program_whose_file_is_gone_can_still_be_started_by_itself";
        let output = Command::new(&copy).arg(name).env(COPY, "1").output().unwrap();
        assert!(output.status.success() && !copy.exists(), "{output:?}");
    }
}
