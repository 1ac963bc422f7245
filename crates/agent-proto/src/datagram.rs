//! Datagrams on a stream: a big-endian `u16` length, the payload.

/// Longest payload of a datagram, in bytes: UDP's own limit over IPv4.
pub const DATAGRAM_BYTES_MAX: usize = 65_507;

/// Puts the length in front. `None`: no UDP datagram is so long.
#[must_use]
pub fn encode_datagram(payload: &[u8]) -> Option<Vec<u8>> {
    let length =
        u16::try_from(payload.len()).ok().filter(|length| usize::from(*length) <= DATAGRAM_BYTES_MAX)?;
    let mut frame = Vec::with_capacity(2 + payload.len());
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(payload);
    Some(frame)
}

/// Finds one datagram at the front of `buffer`: its payload, and how many bytes it takes with its length. `None`: more
/// bytes are needed. Every length is a valid one, so there is nothing to refuse.
#[must_use]
pub fn decode_datagram(buffer: &[u8]) -> Option<(&[u8], usize)> {
    let (length, rest) = buffer.split_first_chunk::<2>()?;
    let length = usize::from(u16::from_be_bytes(*length));
    Some((rest.get(..length)?, 2 + length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_keep_their_borders_and_their_emptiness() {
        let payloads = [&b"one"[..], b"", &[7; DATAGRAM_BYTES_MAX]];
        let stream: Vec<u8> =
            payloads.iter().filter_map(|payload| encode_datagram(payload)).flatten().collect();
        let mut rest = stream.as_slice();
        for payload in payloads {
            let (found, used) = decode_datagram(rest).unwrap();
            assert!(found == payload);
            assert_eq!(decode_datagram(&rest[..used - 1]), None);
            rest = &rest[used..];
        }
        assert!(rest.is_empty());
        assert_eq!(encode_datagram(&[0; DATAGRAM_BYTES_MAX + 1]), None);
    }
}
