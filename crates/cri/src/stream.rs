//! The Stream* twins of the lists: one snapshot, sent in messages that any client can receive.

use prost::Message;
use tokio_stream::{Iter, iter};
use tonic::Status;

/// What the items of a message are, in bytes: clients take four megabytes by default.
const SIZE: usize = 1 << 20;

pub type Chunks<T> = Iter<std::vec::IntoIter<Result<T, Status>>>;

/// As many items a response as [`SIZE`] has room for, in their order; one that is larger has a
/// response of its own. No response for no items.
pub fn chunks<I: Message, T>(
    items: impl IntoIterator<Item = I>,
    response: impl Fn(Vec<I>) -> T,
) -> Chunks<T> {
    let mut responses = Vec::new();
    let mut chunk = Vec::new();
    let mut size = 0;
    for item in items {
        let length = item.encoded_len();
        if size + length > SIZE && !chunk.is_empty() {
            responses.push(Ok(response(std::mem::take(&mut chunk))));
            size = 0;
        }
        size += length;
        chunk.push(item);
    }
    if !chunk.is_empty() {
        responses.push(Ok(response(chunk)));
    }
    iter(responses)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt;

    #[tokio::test]
    async fn all_items_arrive_in_order_and_in_messages_of_a_bounded_size() {
        let small = |n: usize| format!("{n:07}-{}", "s".repeat(SIZE / 10));
        let huge = "h".repeat(3 * SIZE);
        let mut items: Vec<String> = (0..25).map(small).collect();
        items.insert(12, huge.clone());
        let sent: Vec<Vec<String>> = chunks(items.clone(), |chunk| chunk)
            .map(Result::unwrap)
            .collect()
            .await;
        let counts: Vec<_> = sent.iter().map(Vec::len).collect();
        assert_eq!(counts, [9, 3, 1, 9, 4]);
        assert_eq!(sent[2], [huge]);
        assert_eq!(sent.concat(), items);
    }

    #[tokio::test]
    async fn no_items_are_no_message() {
        let none: Vec<Result<Vec<String>, _>> = chunks([], |chunk| chunk).collect().await;
        assert!(none.is_empty());
    }
}
