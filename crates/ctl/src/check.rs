//! `gantryctl check`: what there is outside of gantryd's records, and whose it is.

use std::process::ExitCode;

use anyhow::Result;
use gantry_admin_api::v1::node_client::NodeClient;
use gantry_admin_api::v1::{CheckRequest, Thing};
use tonic::transport::Channel;

use crate::table::table;
use crate::{BAD, MESSAGE_LIMIT, status};

pub async fn run(channel: Channel, repair: bool) -> Result<ExitCode> {
    let answer = NodeClient::new(channel)
        .max_decoding_message_size(MESSAGE_LIMIT)
        .check(CheckRequest { repair })
        .await;
    let things = answer.map_err(status)?.into_inner().things;
    print!("{}", render(&things));
    let orphans = || things.iter().filter(|thing| thing.owner.is_empty());
    let removed = things.iter().filter(|thing| thing.removed).count();
    let done = match repair {
        true => format!(", {removed} of these removed"),
        false => String::new(),
    };
    println!(
        "{} things, {} belong to nothing{done}",
        things.len(),
        orphans().count()
    );
    Ok(match orphans().count() == removed {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(BAD),
    })
}

/// A line each, in columns as wide as they must be.
fn render(things: &[Thing]) -> String {
    let row = |thing: &Thing| {
        let owner = match thing.owner.as_str() {
            "" => "-",
            owner => owner,
        };
        let remark = match (thing.owner.is_empty(), thing.removed) {
            (true, true) => "removed".to_owned(),
            _ => thing.remark.clone(),
        };
        [
            thing.kind.clone(),
            thing.name.clone(),
            owner.to_owned(),
            remark,
        ]
    };
    let rows: Vec<_> = things.iter().map(row).collect();
    table(["KIND", "WHAT", "BELONGS TO", "REMARK"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_nothing_has_a_dash() {
        let thing = |name: &str, owner: &str, removed| Thing {
            kind: "netns".to_owned(),
            name: name.to_owned(),
            owner: owner.to_owned(),
            remark: String::new(),
            removed,
        };
        let things = [
            thing("/a", "pod 1 ns/p", false),
            thing("/b/c", "", false),
            thing("/d", "", true),
            thing("7\x1b[2J\nx", "pod 2", false),
        ];
        let expected = "\
KIND   WHAT     BELONGS TO  REMARK
netns  /a       pod 1 ns/p
netns  /b/c     -
netns  /d       -           removed
netns  7\u{fffd}[2J\u{fffd}x  pod 2
";
        assert_eq!(render(&things), expected);
    }
}
