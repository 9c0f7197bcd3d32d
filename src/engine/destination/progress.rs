//! How far each lane has come, in a file beside the twin: a gateway that was killed finds there what its twin already has.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::types::{LaneIndex, Round};
use crate::wire::LaneStanding;

/// One entry a lane. It survives the gateway's process and not the host, and so does the twin's memory.
#[derive(Debug)]
pub(in crate::engine) struct Progress(File);

const ENTRY_BYTES: u64 = 16;

impl Progress {
    /// Makes the file, or opens the one of an earlier gateway.
    pub(in crate::engine) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.open(path).map(Self)
    }

    /// Notes what a lane has applied. Behind the page itself: what is noted is there, and what is there and not noted comes again.
    pub(in crate::engine) fn note(&self, lane: LaneIndex, standing: LaneStanding) -> io::Result<()> {
        let mut entry = [0; 16];
        let (frames, rest) = entry.split_at_mut(8);
        frames.copy_from_slice(&standing.frames.to_le_bytes());
        rest[..4].copy_from_slice(&standing.round.0.to_le_bytes());
        self.0.write_all_at(&entry, u64::from(lane.0) * ENTRY_BYTES)
    }

    /// What a lane has applied; nothing where nothing was noted.
    pub(in crate::engine) fn of(&self, lane: LaneIndex) -> LaneStanding {
        let mut entry = [0; 16];
        if self.0.read_exact_at(&mut entry, u64::from(lane.0) * ENTRY_BYTES).is_err() {
            return LaneStanding::default();
        }
        let (frames, rest) = entry.split_at(8);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        LaneStanding { frames: number(frames), round: Round(u32::try_from(number(&rest[..4])).unwrap_or(0)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_lane_notes_is_found_by_whoever_opens_the_file_next() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("progress");
        let progress = Progress::open(&path).unwrap();
        let standing = LaneStanding { round: Round(0x0102_0304), frames: 0x0a0b_0c0d_0e0f };
        progress.note(LaneIndex(3), standing).unwrap();
        drop(progress);
        let again = Progress::open(&path).unwrap();
        assert_eq!(again.of(LaneIndex(3)), standing);
        for lane in [0, 2, 4, 15] {
            assert_eq!(again.of(LaneIndex(lane)), LaneStanding::default(), "lane {lane}");
        }
    }
}
