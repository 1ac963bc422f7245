//! Registries that a session's engine treats in a way of their own.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Most registries of each kind, and most places of authorities.
const REGISTRIES_MAX: usize = 16;

/// Longest name of one, in bytes: a host's name and a port.
const NAME_BYTES_MAX: usize = 255 + 6;

/// Longest path, in bytes: the kernel's `PATH_MAX`.
const PATH_BYTES_MAX: usize = 4095;

/// Registries that a session's engine treats in a way of their own. dockerd's words for them are `registry-mirrors` and
/// `insecure-registries`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registries {
    /// Asked before Docker Hub, in this order: `http://HOST[:PORT]` or `https://HOST[:PORT]`.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// Spoken to without TLS where need be, and without verifying it: `HOST[:PORT]`, or a network as `10.0.0.0/8`.
    #[serde(default)]
    pub insecure: Vec<String>,
    /// Files or folders of the host with certificates of authorities, which the engine trusts to sign those of registries
    /// beside the host's own. Absolute.
    #[serde(default)]
    pub authorities: Vec<PathBuf>,
}

impl Registries {
    /// Is none asked before another, and none spoken to without TLS?
    #[must_use]
    pub fn are_all_alike(&self) -> bool {
        self.mirrors.is_empty() && self.insecure.is_empty()
    }

    /// Would an engine take them?
    ///
    /// # Errors
    /// What it wouldn't, in words.
    pub fn check(&self) -> Result<(), String> {
        if self.mirrors.len().max(self.insecure.len()).max(self.authorities.len()) > REGISTRIES_MAX {
            return Err(format!("more than {REGISTRIES_MAX} registries or authorities of a kind"));
        }
        self.authorities.iter().try_for_each(|authority| check_authority(authority))?;
        self.mirrors.iter().try_for_each(|mirror| check_mirror(mirror))?;
        self.insecure.iter().try_for_each(|registry| check_insecure(registry))
    }
}

/// Would an engine take this for a mirror?
///
/// # Errors
/// Why not, in words.
pub fn check_mirror(text: &str) -> Result<(), String> {
    let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    match host.map(|host| host.strip_suffix('/').unwrap_or(host)) {
        Some(host) if is_host(host) => Ok(()),
        _ => Err(format!("{text:?} is no mirror: try https://HOST:PORT, without a path")),
    }
}

/// Would an engine take this for an insecure registry?
///
/// # Errors
/// Why not, in words.
pub fn check_insecure(text: &str) -> Result<(), String> {
    if is_host(text) || network(text).is_some() {
        return Ok(());
    }
    Err(format!("{text:?} is no registry: try HOST:PORT, without http://, or a network as 10.0.0.0/8"))
}

/// Could this be a file or folder with authorities?
///
/// # Errors
/// Why not, in words.
pub fn check_authority(path: &Path) -> Result<(), String> {
    if path.is_absolute() && path.as_os_str().len() <= PATH_BYTES_MAX {
        return Ok(());
    }
    Err(format!("{path:?} is no place of authorities: give an absolute path, /etc/ssl/company.pem say"))
}

fn is_host(text: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_letter)
}

/// Address and prefix length of a network, `10.0.0.0/8`. `None` also where the address is one within the network.
#[must_use]
pub fn network(text: &str) -> Option<(IpAddr, u32)> {
    let (address, length) = text.split_once('/')?;
    let (address, length): (IpAddr, u32) = (address.parse().ok()?, length.parse().ok()?);
    // The address's bits at the top of 128, and how many an address has.
    let (bits, most) = match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    };
    let within = bits.checked_shl(length).unwrap_or(0);
    (length <= most && within == 0).then_some((address, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_engine_would_not_take_is_refused_here() {
        for good in ["http://192.0.2.7:5000", "https://mirror.example.org", "https://mirror.example.org/"] {
            assert_eq!(check_mirror(good), Ok(()));
        }
        for bad in [
            "",
            "mirror.example.org",
            "ftp://a",
            "http://",
            "http://a/b",
            "http://a?b",
            "http://u@a",
            "http://a b",
        ] {
            assert!(check_mirror(bad).is_err(), "{bad}");
        }
        for good in [
            "192.0.2.7:5000",
            "registry.lan",
            "[2001:db8::7]:5000",
            "10.0.0.0/8",
            "2001:db8::/32",
            "0.0.0.0/0",
        ] {
            assert_eq!(check_insecure(good), Ok(()));
        }
        for bad in ["", "http://a", "a/b", "10.0.0.1/8", "10.0.0.0/33", "2001:db8::1/64", "a b"] {
            assert!(check_insecure(bad).is_err(), "{bad}");
        }
        assert_eq!(check_authority(Path::new("/etc/ssl/company.pem")), Ok(()));
        assert!(check_authority(Path::new("company.pem")).is_err());
        let many =
            Registries { mirrors: vec!["http://a".to_owned(); REGISTRIES_MAX + 1], ..Registries::default() };
        assert!(many.check().is_err());
    }
}
