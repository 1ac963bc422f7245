//! Two streams made one.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes that are on their way in one direction at a time.
const BUFFER_BYTES: usize = 32 * 1024;

/// Passes bytes on in both directions, each to its own end. A side that reads no more may still have much to say: so an
/// error in one direction ends that one only.
pub async fn both_ways(
    one: &mut (impl AsyncRead + AsyncWrite + Unpin),
    other: &mut (impl AsyncRead + AsyncWrite + Unpin),
) {
    let (mut from_one, mut to_one) = tokio::io::split(one);
    let (mut from_other, mut to_other) = tokio::io::split(other);
    let _ = tokio::join!(one_way(&mut from_one, &mut to_other), one_way(&mut from_other, &mut to_one));
}

async fn one_way(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    // A side that breaks has ended.
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
    }
    to.shutdown().await
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let (mut client, mut near) = duplex(64);
        let (mut far, mut server) = duplex(64);
        let joined = tokio::spawn(async move { both_ways(&mut near, &mut far).await });
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut question = String::new();
        server.read_to_string(&mut question).await.unwrap();
        server.write_all(b"answer").await.unwrap();
        drop(server);
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
        joined.await.unwrap();
    }

    #[tokio::test]
    async fn the_last_words_of_a_side_that_reads_no_more_arrive() {
        let (mut client, mut near) = duplex(64);
        let (mut far, server) = duplex(64);
        let joined = tokio::spawn(async move { both_ways(&mut near, &mut far).await });
        let (reader, mut writer) = tokio::io::split(server);
        writer.write_all(b"last words").await.unwrap();
        drop((reader, writer));
        let _ = client.write_all(&[0; 4096]).await;
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "last words");
        drop(client);
        joined.await.unwrap();
    }
}
