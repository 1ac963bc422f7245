//! What a VM is made from, by what lies in its store: whatever can't be verified isn't woken, and the disk is booted.

use std::fs;
use std::os::unix::fs::FileExt as _;

use dormouse_api::{CreateSession, SessionId};
use dormouse_snapshot::{Origin, STATE};
use dormouse_vm::{Acceleration, Features};

use super::engine::tests::publish;
use super::*;
use crate::settings::HostTraits;

/// A session, and all that its VMs are made of.
struct Session {
    folder: tempfile::TempDir,
    settings: Settings,
    qemu: Qemu,
}

impl Session {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["images", "store"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let network = NetworkKind::None;
        let host = HostTraits { cpus: 2, memory_mib: 8192, emulation: true, network };
        let wish = CreateSession::named("work".parse().unwrap());
        let store = folder.path().join("store");
        let settings = Settings::settle(&wish, SessionId::from_random(1), store, host).unwrap();
        let qemu = Qemu {
            program: "qemu-system-x86_64".into(),
            version: (10, 0, 0),
            package: String::new(),
            build: "this build".into(),
            features: Features::default(),
            acceleration: Acceleration::Emulation { why: String::new() },
            passt: None,
            frame_filter: None,
        };
        let session = Self { folder, settings, qemu };
        publish(session.folder.path(), &session.images(), "26.1.5");
        dormouse_vm::create_data_disk(&session.store().join(DISK), session.settings.storage_bytes).unwrap();
        session
    }

    /// One that was put to sleep, with something on its disk.
    fn asleep() -> Self {
        let session = Self::new();
        session.seal(session.store(), Origin::Session { generation: 1 });
        fs::write(session.store().join(DISK), "a file system").unwrap();
        session
    }

    /// One whose disk was never used, and a template that fits it.
    fn with_template() -> Self {
        let session = Self::new();
        let made = session.templates().begin().unwrap();
        fs::write(made.path().join(DISK), "a file system").unwrap();
        session.seal(made.path(), Origin::Template);
        session.templates().publish(made).unwrap();
        session
    }

    fn seal(&self, store: &Path, origin: Origin) {
        fs::write(store.join(MEMORY), "what was in memory").unwrap();
        fs::write(store.join(STATE), "of the devices").unwrap();
        let config = self.plan().config(&self.images().newest().unwrap());
        Seal::make(store, origin, SnapshotKey::of(&config, &self.qemu), "boot".into(), None).unwrap();
    }

    fn store(&self) -> &Path {
        &self.settings.storage
    }

    fn template(&self) -> PathBuf {
        let folders = fs::read_dir(self.folder.path().join("templates")).unwrap();
        folders.last().unwrap().unwrap().path()
    }

    fn images(&self) -> ImageStore {
        ImageStore::new(self.folder.path().join("images"))
    }

    fn templates(&self) -> TemplateStore {
        TemplateStore::new(self.folder.path().join("templates"))
    }

    fn plan(&self) -> Plan {
        Plan {
            settings: self.settings.clone(),
            generation: 2,
            runtime_dir: self.folder.path().to_owned(),
            images: self.images(),
            templates: self.templates(),
            qemu: self.qemu.clone(),
            notes: Vec::new(),
            progress: Arc::default(),
        }
    }

    /// What a VM is made from, and what was tried in vain.
    fn made(&self) -> (Start, String) {
        let (config, notes) = self.plan().carry_out().unwrap();
        (config.start, notes.join("\n"))
    }
}

/// Something that happens to a session, or to a folder with a memory in it, and what is said of it then.
type Change = (fn(&mut Session, &Path), &'static str);

const OTHER_VM: [Change; 3] = [
    (|session, _| session.qemu.build = "another build".into(), "QEMU build"),
    (|session, _| session.settings.memory_mib = 2048, "memory (MiB)"),
    (|session, _| session.settings.cpus = 3, "number of CPUs"),
];

const DAMAGES: [Change; 6] = [
    (|_, folder| fs::write(folder.join(STATE), "of the device").unwrap(), "its device state is damaged"),
    (
        |_, folder| fs::write(folder.join(MEMORY), "what was").unwrap(),
        "its memory is damaged: it has another size",
    ),
    (
        |_, folder| {
            fs::copy(folder.join(MEMORY), folder.join("copy")).unwrap();
            fs::rename(folder.join("copy"), folder.join(MEMORY)).unwrap();
        },
        "its memory is damaged: it is another file",
    ),
    (|_, folder| fs::remove_file(folder.join(MEMORY)).unwrap(), "its memory is damaged: it is gone"),
    (
        |_, folder| {
            let text = fs::read_to_string(folder.join("snapshot.json")).unwrap();
            fs::write(folder.join("snapshot.json"), text.replace("1024", "2048")).unwrap();
        },
        "its description is damaged",
    ),
    (|_, folder| fs::write(folder.join("snapshot.json"), "{").unwrap(), "its description is damaged"),
];

#[test]
fn a_snapshot_that_does_not_fit_or_is_damaged_is_refused_with_the_reason_and_the_disk_is_booted() {
    let session = Session::asleep();
    assert_eq!(session.made(), (Start::Incoming, String::new()));
    for (change, words) in OTHER_VM.iter().chain(&DAMAGES) {
        let mut session = Session::asleep();
        let store = session.store().to_owned();
        change(&mut session, &store);
        let (start, said) = session.made();
        assert_eq!(start, Start::Cold, "{words}: {said}");
        assert!(said.starts_with("the snapshot can't be used: ") && said.contains(words), "{words}: {said}");
        assert_eq!(fs::read(store.join(DISK)).unwrap(), b"a file system");
        assert!(!store.join(MEMORY).exists() && Seal::read(&store).unwrap().is_none(), "{words}");
        assert_eq!(session.made(), (Start::Cold, String::new()), "it is said once");
    }
}

#[test]
fn a_snapshot_whose_guest_image_is_gone_is_refused_with_the_reason() {
    let session = Session::asleep();
    let old = session.images().newest().unwrap().hash().as_str().to_owned();
    publish(session.folder.path(), &session.images(), "27.0.0");
    assert_eq!(session.made().0, Start::Incoming, "it is woken with the image that it was made with");
    fs::remove_dir_all(session.folder.path().join("images").join(old)).unwrap();
    let (start, said) = session.made();
    assert!(start == Start::Cold && said.starts_with("the snapshot can't be used: "), "{start:?}: {said}");
}

#[test]
fn a_compressed_snapshot_is_decompressed_for_its_vm_and_refused_when_it_is_damaged() {
    for is_damaged in [false, true] {
        let session = Session::asleep();
        let store = session.store();
        let seal = Seal::read(store).unwrap().unwrap();
        assert!(seal.compress(store, || true).unwrap().unwrap().publish().unwrap());
        assert!(!store.join(MEMORY).exists());
        if is_damaged {
            let file = fs::File::options().write(true).open(store.join("memory.compressed")).unwrap();
            // In the checksum, before the four bytes of the end.
            file.write_all_at(&[0; 4], file.metadata().unwrap().len() - 8).unwrap();
        }
        let (start, said) = session.made();
        if is_damaged {
            assert_eq!(start, Start::Cold);
            assert_eq!(said, "the snapshot can't be used: its memory is damaged: it can't be decompressed");
        } else {
            assert_eq!((start, said), (Start::Incoming, String::new()));
            assert_eq!(fs::read(store.join(MEMORY)).unwrap(), b"what was in memory");
        }
    }
}

#[test]
fn a_template_that_does_not_fit_is_left_alone_and_one_that_is_damaged_goes_with_the_reason() {
    let session = Session::with_template();
    assert_eq!(session.made(), (Start::Incoming, String::new()));
    for (change, words) in &OTHER_VM {
        let mut session = Session::with_template();
        let template = session.template();
        change(&mut session, &template);
        // There is none for such a VM.
        assert_eq!(session.made(), (Start::Cold, String::new()), "{words}");
        assert!(template.exists(), "{words}");
    }
    for (change, words) in &DAMAGES {
        let mut session = Session::with_template();
        let template = session.template();
        change(&mut session, &template);
        let (start, said) = session.made();
        assert_eq!(start, Start::Cold, "{words}: {said}");
        assert_eq!(said, format!("the template can't be used: {words}"));
        assert!(!template.exists(), "{words}");
        assert_eq!(dormouse_vm::allocated_bytes(&session.store().join(DISK)).unwrap(), 0, "{words}");
    }
}

#[test]
fn a_template_of_another_vm_in_the_place_of_one_that_fits_is_refused_with_the_reason() {
    let mut session = Session::with_template();
    let foreign = session.template();
    session.qemu.build = "another build".into();
    let config = session.plan().config(&session.images().newest().unwrap());
    let place = foreign.with_file_name(SnapshotKey::of(&config, &session.qemu).digest());
    fs::rename(&foreign, &place).unwrap();
    let (start, said) = session.made();
    assert!(start == Start::Cold && said.contains("QEMU build"), "{start:?}: {said}");
    assert!(!place.exists());
}
