//! The kernel's tables of TCP connections and routes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The way out of the guest. Every other interface leads to a network of the engine's.
const WAY_OUT: &str = "eth0";

/// A line of `/proc/net/tcp` or `/proc/net/tcp6`, see proc_net_tcp in the kernel's documentation.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) near: SocketAddr,
    pub(crate) far: SocketAddr,
    pub(crate) state: u8,
}

impl Socket {
    pub(crate) const ESTABLISHED: u8 = 1;
    pub(crate) const TIME_WAIT: u8 = 6;
    pub(crate) const LISTENING: u8 = 10;

    pub(crate) fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace().skip(1);
        let (near, far) = (address(words.next()?)?, address(words.next()?)?);
        Some(Self { near, far, state: u8::from_str_radix(words.next()?, 16).ok()? })
    }
}

/// `0100007F:1F90`: words of the address as the processor has them in memory, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    let address = match address.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let bytes = std::array::from_fn(|index| words[index / 4][index % 4]);
            Ipv6Addr::from_octets(bytes).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

/// The networks inside of the guest, each with the length of its prefix.
#[derive(Debug, Default)]
pub(crate) struct Networks(Vec<(IpAddr, u32)>);

impl Networks {
    /// From `/proc/net/route` and `/proc/net/ipv6_route`: those that are reached without a gateway and not by the way out.
    pub(crate) fn read(routes4: &str, routes6: &str) -> Self {
        let routes4 = routes4.lines().filter_map(|line| {
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            let number = |index: usize| Some(u32::from_str_radix(words.get(index)?, 16).ok()?.to_ne_bytes());
            let mask = u32::from_be_bytes(number(7)?);
            (words[0] != WAY_OUT && mask != 0).then_some(())?;
            Some((IpAddr::V4(Ipv4Addr::from(number(1)?)), mask.leading_ones()))
        });
        let routes6 = routes6.lines().filter_map(|line| {
            let words: Vec<_> = line.split_ascii_whitespace().collect();
            let network = Ipv6Addr::from_bits(u128::from_str_radix(words.first()?, 16).ok()?);
            let length = u32::from_str_radix(words.get(1)?, 16).ok()?;
            (*words.last()? != WAY_OUT && length != 0).then_some((IpAddr::V6(network), length))
        });
        Self(routes4.chain(routes6).collect())
    }

    pub(crate) fn has(&self, address: IpAddr) -> bool {
        let is_link_local = matches!(address, IpAddr::V6(address) if address.is_unicast_link_local());
        address.is_loopback()
            || is_link_local
            || self.0.iter().any(|(network, length)| match (network, address) {
                (IpAddr::V4(network), IpAddr::V4(address)) => {
                    let differing = network.to_bits() ^ address.to_bits();
                    differing.leading_zeros() >= *length
                }
                (IpAddr::V6(network), IpAddr::V6(address)) => {
                    let differing = network.to_bits() ^ address.to_bits();
                    differing.leading_zeros() >= *length
                }
                _ => false,
            })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    pub(crate) const ROUTES: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
    pub(crate) const ROUTES6: &str = "fd000000000000010000000000000000 40 00000000000000000000000000000000 00 \
         00000000000000000000000000000000 00000100 00000001 00000000 00000001 br-1\n\
         00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
         00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n";

    /// A line of the kernel's table: near end, far end, state.
    pub(crate) fn socket(near: &str, far: &str, state: &str) -> String {
        format!("   0: {near} {far} {state} 00000000:00000000 00:00000000 00000000     0        0 1 1 0\n")
    }
}
