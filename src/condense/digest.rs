//! What both ends compute over a stream, to find that it is the same.

use ring::digest::{Context, SHA256};
use xxhash_rust::xxh3::Xxh3;

/// SHA-256 over all that is not pages, and XXH3-128 over the pages: pages are as fast to compare as they are to copy, and as with
/// guests whose pages are seen, what guards them on the way is the tunnel.
#[derive(Clone)]
pub struct StreamDigest {
    framing: Context,
    pages: Xxh3,
    bytes: u64,
}

impl std::fmt::Debug for StreamDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamDigest").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Default for StreamDigest {
    fn default() -> Self {
        Self { framing: Context::new(&SHA256), pages: Xxh3::new(), bytes: 0 }
    }
}

impl StreamDigest {
    pub(super) fn framing(&mut self, bytes: &[u8]) {
        self.framing.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    pub(super) fn page(&mut self, content: &[u8]) {
        self.pages.update(content);
        self.bytes += content.len() as u64;
    }

    /// Bytes until now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// SHA-256 over everything but pages and then over the length of the whole stream; XXH3-128 over the pages.
    #[must_use]
    pub fn finish(mut self) -> ([u8; 32], u128) {
        self.framing.update(&self.bytes.to_le_bytes());
        let mut framing = [0; 32];
        framing.copy_from_slice(self.framing.finish().as_ref());
        (framing, self.pages.digest128())
    }
}
