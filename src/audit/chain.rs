//! The hash over the log; the one place that knows how a head comes from lines.
//!
//! Each entry names the hash of the one before it, so the last hash stands for all of them. A tree (RFC 6962) can take
//! this file's place: [`Head`] and the order of calls stay.

use ring::digest;

/// How long the log is, and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Entries.
    pub(super) size: u64,
    /// Stands for their contents and order.
    pub(super) root: [u8; 32],
}

impl Head {
    /// The head of a log without entries.
    pub(super) const EMPTY: Self = Self { size: 0, root: [0; 32] };
}

#[derive(Debug, Clone)]
pub(super) struct Chain {
    head: Head,
}

impl Chain {
    pub(super) fn from(head: Head) -> Self {
        Self { head }
    }

    pub(super) fn head(&self) -> Head {
        self.head
    }

    /// Adds a line, which names the head's size as its index and the head's root as the one before it.
    pub(super) fn append(&mut self, line: &[u8]) -> Head {
        self.head = Head { size: self.head.size.saturating_add(1), root: hash(line) };
        self.head
    }

    /// Adds a line that somebody wrote, if it is the next one.
    pub(super) fn verify(&mut self, line: &[u8], index: u64, prev: [u8; 32]) -> Result<Head, String> {
        if index != self.head.size {
            return Err(format!("index is `{index}`, expected `{}`", self.head.size));
        }
        if prev != self.head.root {
            return Err("does not follow the entry before it".to_owned());
        }
        Ok(self.append(line))
    }
}

/// The leaf hash of RFC 6962.
fn hash(line: &[u8]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&[0]);
    context.update(line);
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}
