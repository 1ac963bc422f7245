//! `cargo xtask bench folders`: one fio on a shared folder, on a volume, in a container and on the host, in the same rounds.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::ours::{Home, Session};
use super::report::circumstances;

/// Where fio lies in its image, with what it is linked with.
const PROGRAM: [&str; 4] = ["/fio/ld-linux-x86-64.so.2", "--library-path", "/fio", "/fio/fio"];

/// What is measured, by fio's names, what is read of it, and what it is called.
const JOBS: [(&str, &str, &str); 7] = [
    ("write", "bw_bytes", "write 32 MiB in 1 MiB, synced, MB/s"),
    ("read", "bw_bytes", "read 32 MiB in 1 MiB, MB/s"),
    ("randread", "iops", "read 4 KiB at random, 1/s"),
    ("randwrite", "iops", "write 4 KiB at random, 1/s"),
    ("create", "iops", "small files made, 1/s"),
    ("stat", "iops", "small files looked at, 1/s"),
    ("delete", "iops", "small files removed, 1/s"),
];

/// fio's options for these, one after the other, on files in the folder that is named before. What stands before the first
/// name is for all, what stands after one is for that job.
const OPTIONS: &str = "--output-format=json --thread --ioengine=psync --stonewall \
    --name=write --filename=data --rw=write --bs=1M --size=32M --end_fsync=1 \
    --name=read --filename=data --rw=read --bs=1M --size=32M \
    --name=randread --filename=data --rw=randread --bs=4k --size=32M --runtime=3 --time_based \
    --name=randwrite --filename=data --rw=randwrite --bs=4k --size=32M --runtime=3 --time_based \
    --name=create --ioengine=filecreate --filename_format=small.$filenum --nrfiles=1000 --filesize=4k \
        --openfiles=1 --rw=write --bs=4k \
    --name=stat --ioengine=filestat --filename_format=small.$filenum --nrfiles=1000 --filesize=4k \
        --openfiles=1 --rw=read --bs=4k \
    --name=delete --ioengine=filedelete --filename_format=small.$filenum --nrfiles=1000 --filesize=4k \
        --openfiles=1 --rw=read --bs=4k";

#[derive(Args)]
pub(crate) struct Folders {
    /// How often each place is measured.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// The page that is written; the figures lie beside it.
    #[arg(long, default_value = "docs/benchmarks/folders.md")]
    out: PathBuf,
    /// Where fio of Debian 13 is unpacked, and kept for the next time.
    #[arg(long, default_value = "build/fio")]
    fio: PathBuf,
    /// The store of guest images.
    #[arg(long, default_value = "build/images")]
    images: PathBuf,
}

/// A place, and what was measured of each job in it.
struct Place {
    name: &'static str,
    values: Vec<Vec<f64>>,
}

impl Folders {
    pub(crate) fn run(self) -> Result<()> {
        ensure!(self.rounds > 0, "nothing is measured in no rounds");
        let fio = prepare(&self.fio)?;
        let folder = tempfile::Builder::new().prefix("bench").tempdir()?;
        let [shared, own] = ["shared", "own"].map(|name| folder.path().join(name));
        for path in [&shared, &own] {
            fs::create_dir(path)?;
        }
        let home = Home::start(&self.images)?;
        home.make_template()?;
        let session = home.create("bench")?;
        import(&session, &fio)?;
        let mut places =
            ["a shared folder", "a volume", "the container's own file system", "the host's own folder"]
                .map(|name| Place { name, values: vec![Vec::new(); JOBS.len()] });
        for round in 1..=self.rounds {
            eprintln!("round {round} of {}", self.rounds);
            let source = format!("{}:/at", shared.display());
            places[0].add(&in_a_container(&session, &["-v", &source])?)?;
            places[1].add(&in_a_container(&session, &["-v", "bench:/at"])?)?;
            // A working folder that is missing is made.
            places[2].add(&in_a_container(&session, &["--workdir", "/at"])?)?;
            let mut native = Command::new(fio.join("ld-linux-x86-64.so.2"));
            native.arg("--library-path").arg(&fio).arg(fio.join("fio"));
            native.arg(format!("--directory={}", own.display())).args(OPTIONS.split_whitespace());
            places[3].add(&native.output()?)?;
        }
        session.remove()?;
        write(&self.out, &places)
    }
}

/// Gathers fio and its libraries in one folder.
fn prepare(folder: &Path) -> Result<PathBuf> {
    let mut unpack = Command::new("scripts/unpack");
    unpack.arg(folder).args(["fio", "fio:/usr/bin/fio"]);
    ensure!(unpack.status()?.success(), "fio can't be unpacked");
    let gathered = folder.join("gathered");
    if gathered.join("fio").exists() {
        return Ok(gathered.canonicalize()?);
    }
    fs::create_dir_all(&gathered)?;
    let libraries = folder.join("tree/usr/lib/x86_64-linux-gnu").canonicalize()?;
    let (loader, program) = (libraries.join("ld-linux-x86-64.so.2"), folder.join("tree/usr/bin/fio"));
    // One library lies where another names it, not where the loader looks.
    let places = format!("{0}:{0}/ceph", libraries.display());
    let listed = Command::new(&loader).args(["--library-path", &places, "--list"]).arg(&program).output()?;
    for line in String::from_utf8(listed.stdout)?.lines() {
        let Some(path) = line.split_once("=> ").and_then(|(_, rest)| rest.split(' ').next()) else {
            continue;
        };
        fs::copy(path, gathered.join(Path::new(path).file_name().context("a library has a name")?))?;
    }
    fs::copy(loader, gathered.join("ld-linux-x86-64.so.2"))?;
    fs::copy(program, gathered.join("fio"))?;
    Ok(gathered.canonicalize()?)
}

/// Makes an image of it.
fn import(session: &Session, fio: &Path) -> Result<()> {
    let archive = fio.with_file_name("image.tar");
    let mut tar = Command::new("tar");
    tar.args(["--create", "--transform=s,^gathered,fio,", "--file"]).arg(&archive);
    tar.arg("--directory").arg(fio.parent().context("it lies in a folder")?).arg("gathered");
    ensure!(tar.status()?.success(), "fio's image can't be packed");
    let archive = archive.to_str().context("paths are UTF-8")?;
    let output = session.docker(&["import", archive, "fio"])?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

fn in_a_container(session: &Session, options: &[&str]) -> Result<Output> {
    let mut arguments = [&["run", "--rm"], options, &["fio"]].concat();
    arguments.extend(PROGRAM);
    arguments.push("--directory=/at");
    arguments.extend(OPTIONS.split_whitespace());
    session.docker(&arguments)
}

impl Place {
    fn add(&mut self, output: &Output) -> Result<()> {
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        let first = said.lines().take_while(|line| !line.starts_with('{')).collect::<Vec<_>>().join("\n");
        ensure!(output.status.success(), "{}: {first}{errors}", self.name);
        let json = said.find('{').map(|begin| &said[begin..]).context("fio tells nothing")?;
        let told: Value = serde_json::from_str(json)?;
        let jobs = told["jobs"].as_array().context("fio tells of its jobs")?;
        for ((name, figure, _), values) in JOBS.iter().zip(&mut self.values) {
            let job = jobs.iter().find(|job| job["jobname"] == *name).context("a job is missing")?;
            ensure!(job["error"] == 0, "{}: {name} failed: {job}", self.name);
            let sum = ["read", "write"].iter().filter_map(|way| job[*way][*figure].as_f64()).sum::<f64>();
            values.push(if *figure == "bw_bytes" { sum / 1e6 } else { sum });
        }
        Ok(())
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn write(out: &Path, places: &[Place]) -> Result<()> {
    let mut page = String::from(
        "# Shared folders\n\nWritten by `cargo xtask bench folders`: fio in a container on a folder of the host, on a volume and on \
         the\ncontainer's own files, and by itself on the host, one after the other in each round. Medians. The host keeps what \
         it has\nread and written in its memory, and a volume in that of the VM; of a shared folder the guest keeps nothing.\n\n",
    );
    for (what, value) in circumstances() {
        let _ = writeln!(page, "- {what}: {value}");
    }
    let _ = write!(page, "\n| |");
    for place in places {
        let _ = write!(page, " {} |", place.name);
    }
    let _ = writeln!(page, "\n|---|{}", "---|".repeat(places.len()));
    let mut figures = Vec::new();
    for (at, (name, _, called)) in JOBS.iter().enumerate() {
        let _ = write!(page, "| {called} |");
        for place in places {
            let _ = write!(page, " {:.0} |", median(&place.values[at]));
            figures.push(json!({ "job": name, "place": place.name, "values": place.values[at] }));
        }
        page.push('\n');
    }
    fs::create_dir_all(out.parent().context("the page needs a folder")?)?;
    fs::write(out, page)?;
    fs::write(out.with_extension("json"), format!("{:#}\n", json!(figures)))?;
    eprintln!("{}", out.display());
    Ok(())
}
