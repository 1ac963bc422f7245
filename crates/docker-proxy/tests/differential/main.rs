//! The same bytes to the relay and to an engine give the same bytes back; and whatever the bytes, the relay never lets an
//! engine see a request that it would not have seen by itself. The engine is hyper, which shares no parser with the relay
//! but httparse, behind which both do their own framing.

mod stage;

use proptest::prelude::*;
use stage::{Engine, Outcome, direct, relayed};

/// How many of each kind are tried.
const CASES: u32 = 1024;

/// One request, well-formed.
fn request() -> impl Strategy<Value = String> {
    let path = prop_oneof![
        Just("/_ping"),
        Just("/v1.45/echo"),
        Just("/chunks?n=3"),
        Just("/empty"),
        Just("/big"),
        Just("/containers/create"),
        Just("/containers/a/start"),
        Just("/missing"),
    ];
    let method = prop_oneof![3 => Just("POST"), 2 => Just("GET"), 1 => Just("HEAD"), 1 => Just("PUT")];
    let header = prop_oneof![
        4 => Just(""),
        1 => Just("X-Registry-Auth: e30=\r\n"),
        1 => Just("Accept:\r\n"),
        1 => Just("connection: keep-alive\r\n"),
        1 => Just("Connection: close\r\n"),
        1 => Just("X: a:b ; c\t\r\n"),
        2 => Just("Expect: 100-continue\r\n"),
    ];
    let version = prop_oneof![6 => Just("1.1"), 1 => Just("1.0")];
    // Of other bodies an engine sees what was read in them, or nothing.
    let wish = "[a-z]{0,100}".prop_map(|image| format!(r#"{{"Image":"{image}"}}"#));
    let bodies = (body("[ -~]{0,200}"), body(wish));
    (method, path, version, header, bodies, any::<bool>()).prop_map(
        |(method, path, version, header, (any, wish), blank)| {
            let body = if path == "/containers/create" { wish } else { any };
            let lead = if blank { "\r\n" } else { "" };
            // A body that is looked at is asked for by the relay itself, and only if it isn't there yet.
            let header =
                if header.starts_with("Expect") && path == "/containers/create" { "" } else { header };
            // HTTP/1.0 knows no chunks.
            let body =
                if version == "1.0" && body.starts_with("Transfer") { "\r\n".to_owned() } else { body };
            format!("{lead}{method} {path} HTTP/{version}\r\nHost: docker\r\n{header}{body}")
        },
    )
}

/// Requests one after the other. The last may be one that is answered before its body is read, after which an engine may or
/// may not read on.
fn requests() -> impl Strategy<Value = String> {
    let early = (any::<bool>(), "[ -~]{0,3000}").prop_map(|(expects, text)| {
        let expect = if expects { "Expect: 100-continue\r\n" } else { "" };
        format!(
            "POST /early HTTP/1.1\r\nHost: docker\r\n{expect}Content-Length: {}\r\n\r\n{text}",
            text.len()
        )
    });
    let last = prop_oneof![2 => request(), 1 => early];
    (proptest::collection::vec(request(), 0..4), last).prop_map(|(first, last)| first.concat() + &last)
}

/// A request that turns its connection into a stream, and what is sent on it.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let head = prop_oneof![
        Just("POST /v1.45/exec/x/start HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"),
        Just("POST /exec/x/start HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
        Just("POST /containers/a/attach?stream=1 HTTP/1.0\r\n\r\n"),
        Just("GET /containers/a/attach/ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"),
    ];
    let input = proptest::collection::vec(any::<u8>(), 0..20_000);
    (head, input).prop_map(|(head, input)| [head.as_bytes(), &input].concat())
}

/// What follows the other header lines: how the body is framed, the empty line, the body.
fn body(text: impl Strategy<Value = String> + Clone) -> impl Strategy<Value = String> {
    let with_length = text.clone().prop_map(|text| format!("Content-Length: {}\r\n\r\n{text}", text.len()));
    prop_oneof![
        Just("\r\n".to_owned()),
        with_length,
        (text, 1_usize..60, any::<bool>()).prop_map(|(text, size, extended)| {
            let extension = if extended { ";name=\"value\"" } else { "" };
            let chunks = text.as_bytes().chunks(size).map(String::from_utf8_lossy);
            let chunks: String =
                chunks.map(|chunk| format!("{:X}{extension}\r\n{chunk}\r\n", chunk.len())).collect();
            let trailer = if extended { "X-Trailer: yes\r\n" } else { "" };
            format!("Transfer-Encoding: chunked\r\n\r\n{chunks}0\r\n{trailer}\r\n")
        }),
    ]
}

/// Bytes that are nearly requests: whole ones, with a piece replaced.
fn nearly() -> impl Strategy<Value = Vec<u8>> {
    let piece = proptest::sample::select(vec![
        &b"\n"[..],
        b"\r",
        b"\r\n",
        b"\r\n\r\n",
        b" ",
        b"\0",
        b"\xff",
        b"0\r\n\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: +5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"GET /_ping HTTP/1.1\r\n\r\n",
        b"HTTP/1.0",
        b"",
    ]);
    let requests = proptest::collection::vec(request(), 1..4);
    (requests, proptest::collection::vec((any::<prop::sample::Index>(), 0_usize..8, piece), 1..4)).prop_map(
        |(requests, changes)| {
            let mut bytes = requests.concat().into_bytes();
            for (at, length, piece) in changes {
                let at = at.index(bytes.len().max(1)).min(bytes.len());
                let end = (at + length).min(bytes.len());
                bytes.splice(at..end, piece.iter().copied());
            }
            bytes
        },
    )
}

fn run(engine: Engine, bytes: &[u8], cuts: &[usize]) -> (Outcome, Outcome) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { (direct(engine, bytes, cuts).await, relayed(engine, bytes, cuts).await) })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn the_same_requests_give_the_same_bytes_back(
        requests in requests(),
        cuts in proptest::collection::vec(1_usize..300, 1..20),
    ) {
        let (direct, relayed) = run(Engine::Hyper, requests.as_bytes(), &cuts);
        prop_assert_eq!(String::from_utf8_lossy(&relayed.answer), String::from_utf8_lossy(&direct.answer));
        prop_assert_eq!(relayed.seen, direct.seen);
    }

    #[test]
    fn a_stream_carries_the_same_bytes_both_ways(
        bytes in stream(),
        status in prop_oneof![Just("101 UPGRADED"), Just("200 OK")],
        hangs_up_after in proptest::option::of(0_usize..3000),
        cuts in proptest::collection::vec(1_usize..3000, 1..20),
    ) {
        let (direct, relayed) = run(Engine::Hijacked { status, hangs_up_after }, &bytes, &cuts);
        prop_assert_eq!(&relayed.answer, &direct.answer);
        prop_assert_eq!(relayed.seen, direct.seen);
    }

    #[test]
    fn no_bytes_make_the_engine_see_what_it_would_not_have_seen(
        bytes in nearly(),
        cuts in proptest::collection::vec(1_usize..300, 1..20),
    ) {
        let (direct, relayed) = run(Engine::Hyper, &bytes, &cuts);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        prop_assert!(direct.seen.starts_with(&relayed.seen), "{text:?}\n{relayed:?}\n{direct:?}");
        // What the relay doesn't pass on it refuses, after the same answers as the engine's; and where an engine hangs up
        // without a word the relay says so.
        if relayed.answer != direct.answer {
            let (answers, engines) =
                (String::from_utf8_lossy(&relayed.answer), String::from_utf8_lossy(&direct.answer));
            let own = answers.rfind("HTTP/1.1 4").max(answers.rfind("HTTP/1.1 502"));
            prop_assert!(engines.starts_with(&answers[..own.unwrap_or(answers.len())]), "{text:?}\n{answers}\n{engines}");
        }
    }
}
