//! What a guest sends on its channel: nothing of it may panic the host, and what is understood is understood from
//! exactly the bytes that are taken.

#![no_main]

use dormouse_agent_proto::{GuestEvent, Nonce, ProcessFrame, Reply, Request, decode_json};
use libfuzzer_sys::fuzz_target;
use serde::de::DeserializeOwned;

fn json<T: DeserializeOwned>(bytes: &[u8]) {
    if let Ok(Some((_, used))) = decode_json::<T>(bytes) {
        assert!(used <= bytes.len());
        assert!(matches!(decode_json::<T>(&bytes[..used]), Ok(Some((_, again))) if again == used));
        assert!(!matches!(decode_json::<T>(&bytes[..used - 1]), Ok(Some(_))));
    }
}

fuzz_target!(|bytes: &[u8]| {
    json::<Reply>(bytes);
    json::<GuestEvent>(bytes);
    json::<Request>(bytes);
    let _ = Nonce(7).from_guest(bytes);
    let _ = Nonce::from_host(bytes);
    let mut rest = bytes;
    while let Ok(Some((frame, used))) = ProcessFrame::decode(rest) {
        assert_eq!(frame.encode(), &rest[..used]);
        rest = &rest[used..];
    }
});
