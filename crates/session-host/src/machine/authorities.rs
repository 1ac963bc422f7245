//! The authorities that a session's engine trusts beside those of its guest image: those that the host's administrator has
//! added to the host's, and those that the session names.
//!
//! They are a file in the guest's memory, in a folder that the engine looks through when it first has to trust somebody, and
//! only then. So they are told to each VM that is booted or copied, before anybody reaches its engine, and an engine that was
//! suspended knows those that there were at its boot. A template is told of the host's, so that its copies need be told only
//! if there are others by then, or a session's own: under emulation that takes a quarter of a copy's start.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use dormouse_mux::Agent;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::time::timeout;

use super::bring_up::blocking;
use super::script;

/// Where an administrator puts authorities: Debian's folder, Fedora's, Arch's.
const HOST_FOLDERS: [&str; 3] = [
    "/usr/local/share/ca-certificates",
    "/etc/pki/ca-trust/source/anchors",
    "/etc/ca-certificates/trust-source/anchors",
];

/// Most bytes of a file, and of all certificates together. All that a distribution trusts is a fifth of it.
const BYTES_MAX: usize = 1 << 20;

/// Most files that are looked at.
const FILES_MAX: usize = 1024;

/// Folders are looked through so deep.
const DEPTH_MAX: usize = 4;

/// Endings of the names of certificates in folders.
const ENDINGS: [&str; 3] = ["crt", "pem", "cer"];

/// Writes what it reads where engines look for authorities.
const TELL: &str = "cat > /etc/ssl/certs/dormouse-host.pem";

/// How long that may take.
const TOLD_WITHIN: Duration = Duration::from_secs(30);

/// What came of telling a guest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Introduced {
    /// What is wrong with the session's own, in words.
    pub(crate) complaints: Vec<String>,
    /// The checksum of what the guest knows now, if it knows any.
    pub(crate) told: Option<String>,
}

/// Tells a guest of the host's authorities and of those in the session's own files and folders, unless it knows just these:
/// `told` is the checksum of those that it was told of before.
///
/// # Errors
/// In words, when the guest can't be told.
pub(crate) async fn introduce(
    agent: &Agent,
    own: &[PathBuf],
    told: Option<&str>,
) -> Result<Introduced, String> {
    let own = own.to_vec();
    let Found { certificates, complaints } =
        blocking(move || Ok::<_, io::Error>(Found::of(&HOST_FOLDERS.map(PathBuf::from), &own))).await?;
    let text = in_one(&certificates);
    let wanted = (!certificates.is_empty()).then(|| dormouse_snapshot::checksum(text.as_bytes()));
    if wanted.as_deref() != told {
        let telling = timeout(TOLD_WITHIN, script::run(agent, TELL, text.as_bytes())).await;
        telling.map_err(|_| "the guest doesn't take them over".to_owned())??;
    }
    Ok(Introduced { complaints, told: wanted })
}

/// Certificates that were found, and what was wrong elsewhere. Whatever else is in a file, a private key say, stays here.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    certificates: BTreeSet<Vec<u8>>,
    complaints: Vec<String>,
}

impl Found {
    /// Those of the host's folders, if they are there, and those that a session names, which must be.
    fn of(host: &[PathBuf], own: &[PathBuf]) -> Self {
        let mut found = Self::default();
        let mut left = BYTES_MAX;
        for folder in host {
            // Not every host has each.
            let _ = found.look_at(folder, &mut left);
        }
        for path in own {
            match found.look_at(path, &mut left) {
                Ok(0) => found.complain(path, "there is no certificate in it"),
                Ok(_) => {}
                Err(error) => found.complain(path, &error.to_string()),
            }
        }
        found
    }

    /// Takes what is in a file or folder, and tells how many things it has in it: certificates, and files that are none.
    fn look_at(&mut self, path: &Path, left: &mut usize) -> io::Result<usize> {
        let (mut files, mut things) = (Vec::new(), 0);
        list(path, DEPTH_MAX, &mut files)?;
        for file in files {
            match certificates(&file) {
                Ok(certificates) => {
                    things += certificates.len();
                    self.add(certificates, left);
                }
                Err(why) => {
                    things += 1;
                    self.complain(&file, &why);
                }
            }
        }
        Ok(things)
    }

    fn complain(&mut self, path: &Path, why: &str) {
        self.complaints.push(format!("{}: {why}", path.display()));
    }

    fn add(&mut self, certificates: Vec<Vec<u8>>, left: &mut usize) {
        for certificate in certificates {
            match left.checked_sub(certificate.len()) {
                Some(rest) => {
                    if self.certificates.insert(certificate) {
                        *left = rest;
                    }
                }
                None => {
                    let complaint = format!("the certificates beyond {BYTES_MAX} bytes are left out");
                    if self.complaints.last() != Some(&complaint) {
                        self.complaints.push(complaint);
                    }
                    return;
                }
            }
        }
    }
}

/// The files of a folder in the order of their names, or the one file that this is.
fn list(path: &Path, depth: usize, files: &mut Vec<PathBuf>) -> io::Result<()> {
    let kind = fs::metadata(path)?;
    if !kind.is_dir() {
        // What is no plain file may hang who opens it.
        if kind.is_file() && files.len() < FILES_MAX {
            files.push(path.to_owned());
        }
        return Ok(());
    }
    let entries = fs::read_dir(path)?.take(FILES_MAX).map(|entry| Ok(entry?.path()));
    let mut paths = entries.collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        let ending = path.extension().and_then(|ending| ending.to_str());
        let is_certificate = ending.is_some_and(|ending| ENDINGS.contains(&ending));
        if is_certificate || (depth > 0 && path.is_dir()) {
            // One that can't be looked at is the administrator's to mend.
            let _ = list(&path, depth.saturating_sub(1), files);
        }
    }
    Ok(())
}

/// The certificates in a file: in PEM, or one as it is (DER).
fn certificates(file: &Path) -> Result<Vec<Vec<u8>>, String> {
    /// How a certificate of an ordinary size begins: a sequence whose length takes two bytes.
    const SEQUENCE: [u8; 2] = [0x30, 0x82];
    let mut bytes = Vec::new();
    let opened = File::open(file).map_err(|error| error.to_string())?;
    opened.take(BYTES_MAX as u64 + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() > BYTES_MAX {
        return Err(format!("it is longer than {BYTES_MAX} bytes"));
    }
    if bytes.starts_with(&SEQUENCE) {
        return Ok(vec![bytes]);
    }
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| format!("it makes no sense: {error}"))?;
    Ok(found.into_iter().map(|certificate| certificate.to_vec()).collect())
}

/// All of them in one text, in PEM.
fn in_one(certificates: &BTreeSet<Vec<u8>>) -> String {
    const LINE: usize = 64;
    let mut text = String::new();
    for certificate in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let mut letters = STANDARD.encode(certificate);
        while letters.len() > LINE {
            let rest = letters.split_off(LINE);
            text.push_str(&letters);
            text.push('\n');
            letters = rest;
        }
        text.push_str(&letters);
        text.push_str("\n-----END CERTIFICATE-----\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use dormouse_agent_proto::{Answer, ProcessFrame, Reply, Request};
    use dormouse_mux::{Limits, Mux, Stream, read_json, read_process_frame, write_json};
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    fn certificate(byte: u8, length: usize) -> Vec<u8> {
        vec![byte; length]
    }

    fn pem(certificate: Vec<u8>) -> String {
        in_one(&BTreeSet::from([certificate]))
    }

    #[test]
    fn certificates_are_found_and_nothing_else_leaves_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let [host, own] = ["host", "own.txt"].map(|name| folder.path().join(name));
        fs::create_dir_all(host.join("company")).unwrap();
        let key = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n";
        fs::write(host.join("company/one.crt"), format!("words\n{key}{}", pem(certificate(1, 100)))).unwrap();
        fs::write(host.join("two.pem"), pem(certificate(2, 3)) + &pem(certificate(1, 100))).unwrap();
        fs::write(host.join("notes.txt"), pem(certificate(9, 9))).unwrap();
        fs::write(host.join("three.cer"), b"\x30\x82\x00\x00").unwrap();
        fs::write(&own, pem(certificate(4, 64))).unwrap();
        let found = Found::of(&[host, folder.path().join("nosuch")], &[own]);
        let expected =
            [certificate(1, 100), certificate(2, 3), b"\x30\x82\x00\x00".to_vec(), certificate(4, 64)];
        assert_eq!(found, Found { certificates: expected.into(), complaints: Vec::new() });
        let text = in_one(&found.certificates);
        assert!(!text.contains("PRIVATE") && text.lines().all(|line| line.len() <= 64), "{text}");
        let again: Vec<_> = CertificateDer::pem_slice_iter(text.as_bytes()).map(Result::unwrap).collect();
        assert_eq!(again.len(), 4);
    }

    #[test]
    fn what_a_session_names_and_is_no_authority_is_told_and_the_rest_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("empty.pem"), "no certificate\n").unwrap();
        fs::write(at("long.pem"), vec![b' '; BYTES_MAX + 1]).unwrap();
        fs::write(at("broken.pem"), "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n").unwrap();
        fs::write(at("good.pem"), pem(certificate(1, 10))).unwrap();
        for (name, why) in [
            ("nosuch.pem", "No such file"),
            ("empty.pem", "there is no certificate in it"),
            ("long.pem", "it is longer than"),
            ("broken.pem", "it makes no sense"),
        ] {
            let found = Found::of(&[], &[at(name), at("good.pem")]);
            assert_eq!(found.certificates.len(), 1, "{name}");
            assert!(found.complaints.len() == 1 && found.complaints[0].contains(why), "{found:?}");
        }
    }

    #[test]
    fn there_is_an_end_to_files_folders_and_certificates() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join("round")).unwrap();
        fs::write(folder.path().join("one.crt"), pem(certificate(1, 10))).unwrap();
        let mut files = Vec::new();
        list(folder.path(), DEPTH_MAX, &mut files).unwrap();
        assert_eq!(files.len(), DEPTH_MAX + 1);
        let mut found = Found::default();
        let many = (0..5).map(|byte| certificate(byte, BYTES_MAX / 4)).collect();
        found.add(many, &mut BYTES_MAX.clone());
        assert_eq!((found.certificates.len(), found.complaints.len()), (4, 1));
    }

    /// A guest in which one process is run.
    async fn guest() -> (Agent, Mux) {
        let (host, guest) = duplex(64 * 1024);
        let mux = Mux::client(host, Limits::AGENT);
        (Agent::new(mux.clone(), mux), Mux::server(guest, Limits::AGENT))
    }

    async fn run(guest: &Mux) -> Stream {
        let mut stream = guest.accept().await.unwrap();
        let asked: Request = read_json(&mut stream).await.unwrap();
        let Request::Run(process) = asked else { panic!("{asked:?}") };
        assert_eq!(process.argv, ["sh", "-c", TELL]);
        write_json(&mut stream, &Reply::Ok(Answer::Running { pid: 7 })).await.unwrap();
        stream
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_reads_all_of_them_and_one_that_reads_nothing_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own.pem");
        let text = in_one(&(0..5).map(|byte| certificate(byte, 50_000)).collect());
        fs::write(&own, &text).unwrap();
        let own = [own];

        let (agent, mux) = guest().await;
        let reading = async {
            let mut stream = run(&mux).await;
            let (mut buffer, mut read) = (Vec::new(), Vec::new());
            while let Some(ProcessFrame::Stdin(piece)) =
                read_process_frame(&mut stream, &mut buffer).await.unwrap()
            {
                if piece.is_empty() {
                    break;
                }
                read.extend(piece);
            }
            stream.write_all(&ProcessFrame::Exit(0).encode()).await.unwrap();
            stream.flush().await.unwrap();
            (read, stream)
        };
        let (told, (read, _stream)) = tokio::join!(introduce(&agent, &own, None), reading);
        let told = told.unwrap();
        assert_eq!(told.complaints, Vec::<String>::new());
        // The host that this runs on may have added some of its own.
        for block in text.split_inclusive("-----END CERTIFICATE-----\n") {
            assert!(String::from_utf8_lossy(&read).contains(block));
        }

        let (agent, mux) = guest().await;
        let (told, _stream) = tokio::join!(introduce(&agent, &own, None), run(&mux));
        assert_eq!(told, Err("the guest doesn't take them over".to_owned()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_copy_is_told_only_if_its_template_was_told_of_others() {
        let folder = tempfile::tempdir().unwrap();
        let own = [folder.path().join("own.pem")];
        fs::write(&own[0], pem(certificate(1, 100))).unwrap();
        let taken_over = |told: Option<String>| {
            let own = own.clone();
            async move {
                let (agent, mux) = guest().await;
                let guest = async {
                    let mut stream = run(&mux).await;
                    stream.write_all(&ProcessFrame::Exit(0).encode()).await.unwrap();
                    stream.flush().await.unwrap();
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    introduced = introduce(&agent, &own, told.as_deref()) => introduced.unwrap().told,
                    () = guest => None,
                }
            }
        };
        let told = taken_over(None).await;
        assert!(told.is_some());
        // This one runs nothing, and so would never answer.
        let (agent, _mux) = guest().await;
        assert_eq!(introduce(&agent, &own, told.as_deref()).await.unwrap().told, told);
        // Others are told to a copy of a template that knew those.
        fs::write(&own[0], pem(certificate(2, 100))).unwrap();
        let other = taken_over(told.clone()).await;
        assert!(other.is_some() && other != told);
    }
}
