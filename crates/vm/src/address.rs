//! Addresses in the guest. The same in every VM: each has a link of its own, on which nobody else is. They stay over
//! a resume and a clone, because the guest's memory holds them; so they are part of the device list's version.

/// The guest's network card.
pub const MAC: &str = "52:54:00:64:6f:72";
/// The guest, with its prefix.
pub const GUEST_V4: &str = "10.0.2.15/24";
/// The way out. Nothing answers there but the network helper.
pub const GATEWAY_V4: &str = "10.0.2.2";
/// Names are resolved here: the helper passes queries on to the host's resolver.
pub const DNS_V4: &str = "10.0.2.3";
/// The guest, with its prefix.
pub const GUEST_V6: &str = "fd64:6f72:6d::15/64";
/// The way out.
pub const GATEWAY_V6: &str = "fd64:6f72:6d::2";
/// The network of [`GUEST_V6`].
pub(crate) const PREFIX_V6: &str = "fd64:6f72:6d::/64";

/// An address without its prefix length.
pub(crate) fn host_part(address: &str) -> &str {
    address.split_once('/').map_or(address, |(host, _)| host)
}
