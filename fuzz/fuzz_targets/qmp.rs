//! What QEMU says, which a guest that broke out of it may have written: lines are the same however they are read.

#![no_main]

use dormouse_qmp::{LineDecoder, Message};
use libfuzzer_sys::fuzz_target;

fn lines(bytes: &[u8], step: usize) -> Vec<Vec<u8>> {
    let (mut decoder, mut lines) = (LineDecoder::default(), Vec::new());
    for part in bytes.chunks(step) {
        decoder.extend(part);
        while let Ok(Some(line)) = decoder.next_line() {
            lines.push(line.to_vec());
        }
    }
    lines
}

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let whole = lines(bytes, bytes.len().max(1));
    assert_eq!(whole, lines(bytes, usize::from(step).max(1)));
    for line in whole {
        let _ = Message::parse(&line);
    }
});
