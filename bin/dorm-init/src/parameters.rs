//! What the host says on the kernel's command line.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail};

/// The host's wishes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Parameters {
    pub(crate) hostname: Option<String>,
    pub(crate) address4: Option<(Ipv4Addr, u8)>,
    pub(crate) gateway4: Option<Ipv4Addr>,
    pub(crate) address6: Option<(Ipv6Addr, u8)>,
    pub(crate) gateway6: Option<Ipv6Addr>,
    pub(crate) name_servers: Vec<IpAddr>,
    /// In seconds.
    pub(crate) lonely: Option<u64>,
}

impl Parameters {
    /// Reads a kernel command line. What isn't ours is left alone; what is ours and makes no sense is an error.
    pub(crate) fn parse(line: &str) -> Result<Self> {
        let mut parameters = Self::default();
        for word in line.split_ascii_whitespace() {
            let Some((name, value)) = word.strip_prefix("dorm.").and_then(|word| word.split_once('=')) else {
                continue;
            };
            parameters
                .set(name, value)
                .with_context(|| format!("the kernel parameter {word:?} makes no sense"))?;
        }
        Ok(parameters)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "hostname" => self.hostname = Some(value.to_owned()),
            "ip4" => self.address4 = Some(with_length(value, 32)?),
            "gw4" => self.gateway4 = Some(value.parse()?),
            "ip6" => self.address6 = Some(with_length(value, 128)?),
            "gw6" => self.gateway6 = Some(value.parse()?),
            "lonely" => self.lonely = Some(value.parse()?),
            "dns" => self.name_servers = value.split(',').map(str::parse).collect::<Result<_, _>>()?,
            _ => bail!("there is no such parameter"),
        }
        Ok(())
    }
}

fn with_length<T: std::str::FromStr>(value: &str, length_max: u8) -> Result<(T, u8)>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let (address, length) = value.split_once('/').context("a prefix length is missing")?;
    let length = length.parse()?;
    if length > length_max {
        bail!("the prefix is too long");
    }
    Ok((address.parse()?, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_parameters_are_found_among_the_kernels() {
        let line = "console=ttyS0 quiet dorm.hostname=work dorm.ip4=10.0.2.15/24 dorm.gw4=10.0.2.2 dorm.dns=10.0.2.3,fd00::1 dorm.lonely=5\n";
        let parameters = Parameters::parse(line).unwrap();
        assert_eq!(parameters.hostname.as_deref(), Some("work"));
        assert_eq!(parameters.address4, Some(([10, 0, 2, 15].into(), 24)));
        assert_eq!(parameters.name_servers.len(), 2);
        assert_eq!(parameters.address6, None);
        assert_eq!(parameters.lonely, Some(5));
    }

    #[test]
    fn nonsense_of_ours_is_an_error() {
        for line in [
            "dorm.ip4=10.0.2.15",
            "dorm.ip4=10.0.2.15/33",
            "dorm.gw6=10.0.2.2",
            "dorm.dns=",
            "dorm.lonely=soon",
            "dorm.colour=red",
        ] {
            assert!(Parameters::parse(line).is_err(), "{line}");
        }
    }
}
