//! Heads of a peer that a log keeps: is each one signed by that peer, and do they only grow?

use std::path::Path;

use crate::audit::entry::{Event, Outcome, StoredEntry, hex};
use crate::audit::note::{self, Checkpoint};
use crate::audit::verify::{Filter, Verdict, read};

/// Checks every head in the log in `dir` that names `peer_key`, and that its peer has no head under another key.
#[must_use]
pub fn verify_peer_heads(dir: &Path, peer_key: &[u8; 32]) -> Verdict {
    let heads = match read(dir, Filter { event: Some(Event::PeerHead), ..Filter::default() }).and_then(Iterator::collect) {
        Ok(heads) => heads,
        Err(error) => return Verdict::bad(None, error.to_string()),
    };
    let kept: Vec<StoredEntry> = Vec::into_iter(heads).filter(|entry| entry.outcome == Some(Outcome::Done)).collect();
    let named = hex(peer_key);
    let Some(peer) = kept.iter().find(|entry| text(entry, "public_key") == Some(&named)).and_then(|entry| entry.peer.clone()) else {
        return Verdict::bad(None, "the log keeps no head that is signed by the given key");
    };
    let mut last: Option<Checkpoint> = None;
    let mut count = 0_u64;
    for entry in kept.iter().filter(|entry| entry.peer.as_ref() == Some(&peer) || text(entry, "public_key") == Some(&named)) {
        if entry.peer.as_ref() != Some(&peer) {
            let other = entry.peer.as_deref().unwrap_or("nobody");
            return Verdict::bad(Some(entry.index), format!("the given key is `{peer}`'s, and here that of `{other}`"));
        }
        let head = match note::open(text(entry, "checkpoint").unwrap_or_default(), peer_key) {
            Ok(head) => head,
            Err(why) => return Verdict::bad(Some(entry.index), format!("the head of `{peer}` {why}")),
        };
        if let Some(last) = &last
            && (head.origin != last.origin || head.size < last.size || (head.size == last.size && head.root != last.root))
        {
            let (was, is) = (last.size, head.size);
            return Verdict::bad(
                Some(entry.index),
                format!("the head of `{peer}` of {is} entries does not follow the one of {was} kept before"),
            );
        }
        last = Some(head);
        count = count.saturating_add(1);
    }
    Verdict::Good(format!("{count} heads of `{peer}` are signed by the given key and never go back"))
}

fn text<'a>(entry: &'a StoredEntry, name: &str) -> Option<&'a str> {
    entry.detail.get(name)?.as_str()
}
