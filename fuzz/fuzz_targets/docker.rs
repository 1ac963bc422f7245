//! What Docker clients and the engine send: heads, and bodies to their end. However the bytes are cut into reads, the
//! outcome is the same, and no byte is taken twice or lost.

#![no_main]

use bytes::BytesMut;
use dormouse_docker_proxy::{BodyFraming, BodyScanner, HeadScanner, parse_request, parse_response};
use libfuzzer_sys::fuzz_target;

/// The first head with its body, as far as it goes: the head, the body's payload, how many bytes were used, and whether
/// all was understood.
#[derive(Debug, PartialEq)]
struct Seen {
    head: Vec<u8>,
    payload: Vec<u8>,
    used: usize,
    understood: bool,
}

fn read(bytes: &[u8], step: usize, is_request: bool) -> Seen {
    let mut seen = Seen { head: Vec::new(), payload: Vec::new(), used: 0, understood: true };
    let (mut buffer, mut heads) = (BytesMut::new(), HeadScanner::default());
    let mut body: Option<BodyScanner> = None;
    for part in bytes.chunks(step) {
        buffer.extend_from_slice(part);
        if body.is_none() {
            let framing = match heads.take(&mut buffer) {
                Ok(None) => continue,
                Ok(Some(head)) => {
                    seen.head = head.to_vec();
                    seen.used = head.len();
                    framing(head, is_request)
                }
                Err(_) => None,
            };
            let Some(framing) = framing else {
                seen.understood = false;
                return seen;
            };
            body = Some(BodyScanner::new(framing));
        }
        let Some(body) = &mut body else { continue };
        match body.advance(&buffer, |part| seen.payload.extend_from_slice(part)) {
            Ok(used) => {
                assert!(used <= buffer.len());
                assert!(used == buffer.len() || body.is_done(), "a body that goes on takes all there is");
                seen.used += used;
                let _ = buffer.split_to(used);
            }
            Err(_) => {
                seen.understood = false;
                return seen;
            }
        }
        if body.is_done() {
            return seen;
        }
    }
    seen
}

fn framing(head: bytes::Bytes, is_request: bool) -> Option<BodyFraming> {
    if is_request {
        parse_request(head).ok().map(|head| head.framing)
    } else {
        parse_response(head, "GET").ok().map(|head| head.framing)
    }
}

fuzz_target!(|input: (u8, bool, &[u8])| {
    let (step, is_request, bytes) = input;
    let whole = read(bytes, bytes.len().max(1), is_request);
    let parts = read(bytes, usize::from(step).max(1), is_request);
    assert_eq!(whole.understood, parts.understood);
    assert_eq!(whole.head, parts.head);
    if whole.understood {
        assert_eq!(whole, parts);
    }
});
