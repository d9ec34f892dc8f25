//! The Stream* twins of the lists: one snapshot, sent in chunks that stay far below the message
//! limit of a client.

use tokio_stream::{Iter, iter};
use tonic::Status;

/// Items a message: a container with the kubelet's labels and annotations is a few kilobytes,
/// and clients take four megabytes by default.
const CHUNK: usize = 200;

pub type Chunks<T> = Iter<std::vec::IntoIter<Result<T, Status>>>;

/// One response per chunk of items; none for no items.
pub fn chunks<I, T>(items: Vec<I>, response: impl Fn(Vec<I>) -> T) -> Chunks<T> {
    chunks_of(CHUNK, items, response)
}

/// As [`chunks`], for items that are larger.
pub fn chunks_of<I, T>(length: usize, items: Vec<I>, response: impl Fn(Vec<I>) -> T) -> Chunks<T> {
    let mut items = items.into_iter();
    let mut responses = Vec::new();
    while items.len() > 0 {
        responses.push(Ok(response(items.by_ref().take(length).collect())));
    }
    iter(responses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt;

    #[tokio::test]
    async fn all_items_arrive_once_and_in_order() {
        let items: Vec<usize> = (0..2 * CHUNK + 1).collect();
        let sent: Vec<Vec<usize>> = chunks(items.clone(), |chunk| chunk)
            .map(Result::unwrap)
            .collect()
            .await;
        assert_eq!(sent.len(), 3);
        assert_eq!(sent.concat(), items);
        let none: Vec<_> = chunks(Vec::<u8>::new(), |chunk| chunk).collect().await;
        assert!(none.is_empty());
    }
}
