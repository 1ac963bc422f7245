use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;

/// A machine in a folder: a home that is reached by a link of the system's, what lies beside it, and a policy.
struct Machine {
    folder: tempfile::TempDir,
    policy: Policy,
}

impl Machine {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        for path in
            ["data/home/me/src/sub", "data/home/me/.local/dormouse/run", "data/home/you", "etc", "tmp"]
        {
            fs::create_dir_all(at(path)).unwrap();
        }
        symlink("data/home", at("home")).unwrap();
        fs::write(at("etc/passwd"), "root").unwrap();
        fs::write(at("data/home/me/file"), "mine").unwrap();
        fs::write(at("data/home/you/file"), "yours").unwrap();
        let allowed = [at("home/me"), at("tmp"), at("nowhere"), "/".into()];
        let policy = Policy::new(&allowed, &[at("home/me/.local/dormouse")]);
        Self { folder, policy }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn find(&self, path: &str) -> Result<PathBuf, Refused> {
        self.policy.find(&self.at(path), Missing::Refuse)
    }
}

#[test]
fn what_is_allowed_is_found_where_it_really_is() {
    let machine = Machine::new();
    for (path, real) in [
        ("home/me/src", "data/home/me/src"),
        ("data/home/me/src/sub", "data/home/me/src/sub"),
        ("home/me/file", "data/home/me/file"),
        ("home/me/src/../src//sub/.", "data/home/me/src/sub"),
        ("home/you/../me/src", "data/home/me/src"),
        ("tmp", "tmp"),
    ] {
        assert_eq!(machine.find(path).unwrap(), machine.at(real), "{path}");
    }
}

/// Each row is an attempt to have a file that isn't the owner's to share.
#[test]
fn nothing_outside_of_the_allowed_folders_is_found_whatever_way_is_tried() {
    let machine = Machine::new();
    let home = |path: &str| machine.at("data/home/me").join(path);
    symlink("/etc", home("etc")).unwrap();
    symlink("/etc/shadow", home("shadow")).unwrap();
    symlink("../you", home("you")).unwrap();
    symlink(".", home("loop")).unwrap();
    symlink(home("src"), home("src/inner")).unwrap();
    symlink(".local/dormouse", home("state")).unwrap();
    symlink("/", home("root")).unwrap();
    symlink("/proc/self/root", home("magic")).unwrap();
    symlink(machine.at("one"), machine.at("two")).unwrap();
    symlink(machine.at("two"), machine.at("one")).unwrap();
    let _listening = UnixListener::bind(home("socket")).unwrap();
    mknodat(CWD, home("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let outside = "outside of the folders";
    let link = "is a symbolic link";
    for (path, why) in [
        ("etc", outside),
        ("etc/passwd", outside),
        ("home/you", outside),
        ("home/you/file", outside),
        ("home", outside),
        ("", outside),
        ("home/me/../you/file", outside),
        ("home/me/../../../etc/passwd", outside),
        ("home/me/../../../../../../../../etc", outside),
        ("tmp/../etc/passwd", outside),
        ("home/mean", outside),
        ("home/me/etc", link),
        ("home/me/etc/shadow", link),
        ("home/me/shadow", link),
        ("home/me/you/file", link),
        ("home/me/loop/src", link),
        ("home/me/src/inner", link),
        ("home/me/state/run", link),
        ("home/me/root/etc/passwd", link),
        ("home/me/magic/etc/passwd", link),
        ("one", "too many symbolic links"),
        ("home/me/.local/dormouse", "Dormouse's own"),
        ("home/me/.local/dormouse/run", "Dormouse's own"),
        ("home/me/.local", "Dormouse's own"),
        ("home/me", "Dormouse's own"),
        ("home/me/socket", "it is a socket"),
        ("home/me/pipe", "it is a pipe"),
        ("home/me/missing", "bind source path does not exist"),
        ("home/me/file/x", "Not a directory"),
    ] {
        let refused = machine.find(path).expect_err(path).to_string();
        assert!(refused.contains(why), "{path}: {refused}");
    }
    for path in [
        "/etc/passwd",
        "/etc/shadow",
        "/proc/1/root",
        "/proc/self/environ",
        "/dev/sda",
        "/sys",
        "/",
        "/mnt/x",
    ] {
        let refused = machine.policy.find(Path::new(path), Missing::Make).expect_err(path).to_string();
        assert!(
            refused.contains("outside of the folders") || refused.contains("ermission"),
            "{path}: {refused}"
        );
    }
    assert!(matches!(machine.policy.find(Path::new("relative"), Missing::Make), Err(Refused::Path)));
}

#[test]
fn a_folder_that_is_missing_is_made_where_it_may_be_and_nowhere_else() {
    let machine = Machine::new();
    let make = |path: &str| machine.policy.find(&machine.at(path), Missing::Make);
    assert_eq!(make("home/me/new/a/b").unwrap(), machine.at("data/home/me/new/a/b"));
    assert!(machine.at("data/home/me/new/a/b").is_dir());
    symlink("/etc/gone", machine.at("data/home/me/dangling")).unwrap();
    for path in
        ["etc/new", "home/you/new", "home/me/dangling/x", "home/me/.local/dormouse/hooks.d", "home/me/file/x"]
    {
        make(path).expect_err(path);
    }
    assert!(!machine.at("etc/new").exists() && !machine.at("data/home/you/new").exists());
    assert!(!machine.at("data/home/me/.local/dormouse/hooks.d").exists());
}

#[test]
fn rules_name_folders_line_by_line() {
    let home = Path::new("/home/me");
    let text = "# what may be shared\n~\n ~/src # mine\n/data\n\n~you\n";
    let expected = ["/home/me/", "/home/me/src", "/data", "~you"].map(PathBuf::from);
    assert_eq!(rules(text, Some(home)), expected);
    assert_eq!(rules("~\n/data", None), [PathBuf::from("/data")]);
    let nothing = Policy::new(&rules("", Some(home)), &[]);
    let refused = nothing.find(Path::new("/tmp"), Missing::Refuse).unwrap_err();
    assert_eq!(refused.to_string(), "it is outside of the folders that may be shared (none)");
}
