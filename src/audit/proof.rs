//! That one entry is in a log, as one small file that needs nothing else (C2SP tlog-proof). The extra data is the entry's line, so
//! that the file says itself what it proves.

use crate::audit::entry::StoredEntry;
use crate::audit::note::{self, Checkpoint, base64, unbase64};
use crate::audit::tree::{Hash, check_inclusion, leaf_hash};
use crate::limits;

const HEADER: &str = "c2sp.org/tlog-proof@v1\n";

/// An entry and what ties it to a signed head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// The entry, exactly as it stands in the log.
    pub line: Vec<u8>,
    /// The entry, read.
    pub entry: StoredEntry,
    /// The head that covers it, as its log signed it; perhaps cosigned.
    pub checkpoint: Checkpoint,
    path: Vec<[u8; 32]>,
}

impl Proof {
    /// The text of a proof.
    pub(super) fn text(line: &[u8], index: u64, path: &[Hash], checkpoint: &str) -> String {
        let mut text = format!("{HEADER}extra {}\nindex {index}\n", base64(line));
        for hash in path {
            text.push_str(&base64(hash));
            text.push('\n');
        }
        text.push('\n');
        text.push_str(checkpoint);
        text
    }

    /// Reads a proof and checks everything but signatures.
    ///
    /// # Errors
    ///
    /// What of it is not as it must be.
    pub fn read(text: &str) -> Result<Self, String> {
        if text.len() > limits::AUDIT_PROOF_BYTES_MAX {
            return Err(format!("has {} bytes, expected at most {}", text.len(), limits::AUDIT_PROOF_BYTES_MAX));
        }
        let rest = text.strip_prefix(HEADER).ok_or("is no proof: its first line is not `c2sp.org/tlog-proof@v1`")?;
        let (head, checkpoint) = rest.split_once("\n\n").ok_or("is no proof: there is no empty line before the checkpoint")?;
        let mut lines = head.split('\n');
        let line = lines.next().and_then(|line| line.strip_prefix("extra ")).ok_or("does not say what it proves: there is no `extra`")?;
        let line = unbase64(line).ok_or("its `extra` is not base64")?;
        let index = lines.next().and_then(|line| line.strip_prefix("index ")).ok_or("is no proof: there is no `index`")?;
        let number = index.parse::<u64>().ok().filter(|number| number.to_string() == index);
        let index = number.ok_or_else(|| format!("is no proof: `{}` is no index", index.escape_debug()))?;
        let hash = |line: &str| {
            let hash = unbase64(line).and_then(|hash| hash.try_into().ok());
            hash.ok_or_else(|| format!("is no proof: `{}` is not the base64 of a SHA-256", line.escape_debug()))
        };
        let path = lines.map(hash).collect::<Result<Vec<Hash>, _>>()?;
        if path.len() > limits::AUDIT_PROOF_HASHES_MAX {
            return Err(format!("has {} hashes, expected at most {}", path.len(), limits::AUDIT_PROOF_HASHES_MAX));
        }
        let checkpoint = note::read(checkpoint).map_err(|why| format!("its checkpoint {why}"))?;
        let entry = StoredEntry::parse(&line).map_err(|why| format!("its entry {why}"))?;
        if entry.index != index {
            return Err(format!("it is of entry {index}, and its entry says that it is {}", entry.index));
        }
        check_inclusion(&path, index, leaf_hash(&line), checkpoint.head())?;
        Ok(Self { line, entry, checkpoint, path })
    }

    /// Whether the log's key signed the head.
    ///
    /// # Errors
    ///
    /// It did not.
    pub fn check_signer(&self, public_key: &[u8; 32]) -> Result<(), String> {
        note::open(&self.checkpoint.text, public_key).map(drop).map_err(|why| format!("its checkpoint {why}"))
    }

    /// When a witness cosigned the head, in seconds since the epoch.
    ///
    /// # Errors
    ///
    /// It did not, or not this head.
    pub fn check_witness(&self, public_key: &[u8; 32]) -> Result<u64, String> {
        let at = note::cosigned_at(&self.checkpoint.text, public_key).map_err(|why| format!("its checkpoint {why}"))?;
        at.ok_or_else(|| "its checkpoint has no cosignature of the given key".to_owned())
    }

    /// The same proof with one more signature on its checkpoint.
    pub(super) fn with_signature(&self, line: &str) -> String {
        Self::text(&self.line, self.entry.index, &self.path, &format!("{}{line}", self.checkpoint.text))
    }
}
