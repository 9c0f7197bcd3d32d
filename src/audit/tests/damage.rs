//! A table of damaged logs: what was done, which verdict says so, at which entry, and in which words.

use std::fs;
use std::sync::LazyLock;

use super::*;
use crate::audit::disk::RealDisk;
use crate::audit::tile::Name;
use crate::audit::tree::Head;
use crate::audit::walk::{Walk, checkpoint_line};
use crate::types::MigrationId;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Says {
    Content,
    Signer,
    Completeness,
    Witnesses,
}
use Says::{Completeness, Content, Signer as BadSigner, Witnesses};

/// Entries of the log that is damaged: one full tile and a part of one.
const ENTRIES: u64 = 300;
const MIGRATION: MigrationId = MigrationId([2; 16]);

/// A log with three segments, a head and a proof of a peer's, and a cosignature.
static GOOD: LazyLock<TempDir> = LazyLock::new(|| {
    let (dir, other) = (tempdir(), tempdir());
    let (own, peer) = ("spiffe://dc1/gw-a".parse().unwrap(), "spiffe://dc2/gw-b".parse().unwrap());
    let a = AuditLog::open_on(Arc::new(RealDisk), dir.path(), ORIGIN, TestSigner::new(1), 80_000).unwrap();
    let b = AuditLog::open(other.path(), "sealane/peer", TestSigner::new(2)).unwrap();
    b.record(&Entry::new(Event::Handoff).migration(MIGRATION).outcome(Outcome::Done).detail("record", "run")).unwrap();
    let shown = b.announce(&own, None, Some(MIGRATION)).unwrap();
    a.keep_peer_head(&peer, &TestSigner::new(2).public_key(), &shown, None).unwrap();
    let shown = a.announce(&peer, None, None).unwrap();
    let Answer::Cosigned(size, line) = b.keep_peer_head(&own, &TestSigner::new(1).public_key(), &shown, None).unwrap() else { panic!() };
    a.keep_cosignature(&peer, &TestSigner::new(2).public_key(), size, &line).unwrap();
    while a.head().size < ENTRIES {
        a.record(&entry(usize::try_from(a.head().size).unwrap())).unwrap();
    }
    drop(a);
    dir
});

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let to = to.join(item.file_name());
        if item.file_type().unwrap().is_dir() { copy(&item.path(), &to) } else { assert!(fs::copy(item.path(), &to).is_ok()) }
    }
}

/// A copy of the good log.
struct Victim {
    dir: TempDir,
    given: Option<String>,
}

impl Victim {
    fn segment(&self, number: usize) -> PathBuf {
        segment::list(self.dir.path()).unwrap()[number].path.clone()
    }

    /// The segment that has an entry, and the number of its line there.
    fn line_of(&self, index: u64) -> (PathBuf, usize) {
        let wanted = format!("\"index\":{index},");
        for segment in segment::list(self.dir.path()).unwrap() {
            let text = fs::read_to_string(&segment.path).unwrap();
            if let Some(line) = text.lines().position(|line| line.contains(&wanted)) {
                return (segment.path, line);
            }
        }
        panic!("no entry {index}");
    }

    /// Changes the lines from that of an entry on.
    fn lines(&self, index: u64, change: impl FnOnce(&mut Vec<String>, usize)) {
        let (path, at) = self.line_of(index);
        let mut lines: Vec<String> = fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
        change(&mut lines, at);
        fs::write(&path, lines.into_iter().map(|line| line + "\n").collect::<String>()).unwrap();
    }

    fn entry(&self, index: u64, from: &str, to: &str) {
        self.lines(index, |lines, at| {
            assert!(lines[at].contains(from), "{}", lines[at]);
            lines[at] = lines[at].replacen(from, to, 1);
        });
    }

    /// Changes the checkpoint behind an entry.
    fn behind(&self, index: u64, from: &str, to: &str) {
        self.lines(index, |lines, at| {
            assert!(lines[at + 1].contains(from), "{}", lines[at + 1]);
            lines[at + 1] = lines[at + 1].replacen(from, to, 1);
        });
    }

    fn file(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }

    fn tile(&self, name: Name, change: impl FnOnce(&mut Vec<u8>)) {
        self.file(&name.path(self.dir.path()), change);
    }

    fn published(&self) -> PathBuf {
        segment::checkpoint_path(self.dir.path())
    }

    fn head(&self) -> Checkpoint {
        note::read(&fs::read_to_string(self.published()).unwrap()).unwrap()
    }

    fn publish(&self, seed: u8, origin: &str, head: Head) {
        fs::write(self.published(), note::sign(TestSigner::new(seed).as_ref(), origin, head).unwrap().text).unwrap();
    }

    fn proof(&self) -> PathBuf {
        self.dir.path().join(format!("proofs/{MIGRATION}-run.tlog-proof"))
    }

    fn give(&mut self, seed: u8, origin: &str, head: Head) {
        self.given = Some(note::sign(TestSigner::new(seed).as_ref(), origin, head).unwrap().text);
    }

    /// The text of the checkpoint behind an entry.
    fn checkpoint(&self, index: u64) -> String {
        let (path, at) = self.line_of(index);
        let text = fs::read_to_string(&path).unwrap();
        walk::parse_checkpoint_line(text.lines().nth(at + 1).unwrap().as_bytes()).unwrap().0.text
    }
}

fn text(change: impl FnOnce(&str) -> String) -> impl FnOnce(&mut Vec<u8>) {
    |bytes| *bytes = change(std::str::from_utf8(bytes).unwrap()).into_bytes()
}

/// What was done; who says so, at which entry, in which words; how it is done.
type Case = (&'static str, Says, Option<u64>, &'static str, fn(&mut Victim));

const LAST: u64 = ENTRIES - 1;
const FULL: Name = Name { level: Some(0), index: 0, width: 256 };
const PART: Name = Name { level: Some(0), index: 1, width: 44 };
const ABOVE: Name = Name { level: Some(1), index: 0, width: 1 };
const BUNDLE: Name = Name { level: None, index: 0, width: 256 };
const BUNDLE_PART: Name = Name { level: None, index: 1, width: 44 };

const CASES: &[Case] = &[
    // Entries.
    ("a number changed", Content, Some(50), "its hash is not the tile's", |v| v.entry(50, "\"number\":50", "\"number\":51")),
    ("an outcome changed", Content, Some(7), "not the one that was signed", |v| v.entry(7, "\"allow\"", "\"deny\"")),
    ("a VM's name changed", Content, Some(299), "not the one that was signed", |v| v.entry(299, "vm-1", "vm-2")),
    ("a time changed", Content, Some(120), "not the one that was signed", |v| v.entry(120, "\"time\":\"2", "\"time\":\"3")),
    ("a migration changed", Content, Some(8), "not the one that was signed", |v| v.entry(8, "0202", "0302")),
    ("an index changed", Content, Some(9), "index is `10`, expected `9`", |v| v.entry(9, "\"index\":9", "\"index\":10")),
    ("two entries changed", Content, Some(20), "not the one that was signed", |v| {
        v.entry(200, "\"allow\"", "\"deny\"");
        v.entry(20, "\"allow\"", "\"deny\"");
    }),
    ("an entry removed", Content, Some(30), "stands behind entry 29", |v| v.lines(30, |lines, at| drop(lines.remove(at)))),
    ("a commit removed", Content, Some(30), "index is `31`, expected `30`", |v| v.lines(30, |lines, at| drop(lines.drain(at..at + 2)))),
    ("a commit doubled", Content, Some(31), "index is `30`, expected `31`", |v| {
        v.lines(30, |lines, at| {
            let (entry, checkpoint) = (lines[at].clone(), lines[at + 1].clone());
            lines.splice(at..at, [entry, checkpoint]);
        });
    }),
    ("an entry doubled", Content, Some(31), "index is `30`, expected `31`", |v| {
        v.lines(30, |lines, at| lines.insert(at, lines[at].clone()))
    }),
    ("two entries swapped", Content, Some(40), "index is `41`, expected `40`", |v| v.lines(40, |lines, at| lines.swap(at, at + 2))),
    ("an entry of elsewhere put in", Content, Some(60), "not the one that was signed", |v| {
        v.lines(60, |lines, at| lines[at] = lines[at - 2].replace("\"index\":59", "\"index\":60"));
    }),
    ("a space added", Content, Some(61), "not in canonical form", |v| v.entry(61, "\":", "\": ")),
    ("fields in another order", Content, Some(62), "not in canonical form", |v| {
        v.entry(62, "\"event\":\"decision\",", "");
        v.entry(62, "\"index\":62,", "\"index\":62,\"event\":\"decision\",");
    }),
    ("a field doubled", Content, Some(63), "is no entry", |v| v.entry(63, "\"index\":63", "\"index\":63,\"index\":63")),
    ("a field unknown", Content, Some(64), "is no entry", |v| v.entry(64, "\"vm\":", "\"vk\":1,\"vm\":")),
    ("a field missing", Content, Some(65), "is no entry", |v| v.entry(65, "\"event\":\"decision\",", "")),
    ("an event unknown", Content, Some(66), "is no entry", |v| v.entry(66, "\"decision\"", "\"decisive\"")),
    ("a float", Content, Some(67), "has the float", |v| v.entry(67, "\"number\":67", "\"number\":67.5")),
    ("a level too deep", Content, Some(68), "deeper than", |v| {
        v.entry(68, "\"number\":68", &format!("\"number\":{}{}", "[".repeat(9), "]".repeat(9)))
    }),
    ("no JSON", Content, Some(69), "is no JSON", |v| v.entry(69, "{", "(")),
    ("bytes that are no text", Content, Some(70), "is no JSON", |v| {
        let (path, at) = v.line_of(70);
        v.file(&path, |bytes| {
            let start = bytes.split_inclusive(|byte| *byte == b'\n').take(at).map(<[u8]>::len).sum::<usize>();
            bytes[start + 12] = 0xff;
        });
    }),
    ("an empty line", Content, Some(71), "is no JSON", |v| v.lines(71, |lines, at| lines.insert(at, String::new()))),
    ("two lines joined", Content, Some(72), "is no JSON", |v| {
        v.lines(72, |lines, at| lines[at] = lines[at].clone() + &lines.remove(at + 1))
    }),
    ("lines that end with CR LF", Content, Some(0), "not in canonical form", |v| v.file(&v.segment(0), text(|t| t.replace('\n', "\r\n")))),
    ("a byte order mark", Content, Some(0), "is no JSON", |v| v.file(&v.segment(0), text(|t| format!("\u{feff}{t}")))),
    ("a block of zeros", Content, Some(74), "is no JSON", |v| v.lines(74, |lines, at| lines[at] = "\0".repeat(lines[at].len()))),
    ("a line far too long", Content, Some(75), "longer than any", |v| v.lines(75, |lines, at| lines[at] = "x".repeat(1 << 20))),
    ("lines behind an entry that are none", Content, Some(ENTRIES), "is no JSON", |v| {
        v.file(&v.segment(2), text(|t| t.trim_end().rsplit_once('\n').unwrap().0.to_owned() + "\n" + &"{\n".repeat(300)));
    }),
    // The end of the log.
    ("the last commit cut off", Completeness, Some(LAST), "those from 299 on are missing", |v| {
        v.lines(LAST, |lines, at| lines.truncate(at));
    }),
    ("ten commits cut off", Completeness, Some(290), "those from 290 on are missing", |v| v.lines(290, |lines, at| lines.truncate(at))),
    ("the last checkpoint cut off", BadSigner, Some(LAST), "nothing signed covers the entries from here on", |v| {
        v.lines(LAST, |lines, at| lines.truncate(at + 1));
    }),
    ("the end of the last line cut off", Content, Some(ENTRIES), "the line has no end", |v| {
        v.file(&v.segment(2), |bytes| bytes.truncate(bytes.len() - 1))
    }),
    ("half of the last line cut off", Content, Some(ENTRIES), "the line has no end", |v| {
        v.file(&v.segment(2), |bytes| bytes.truncate(bytes.len() - 99))
    }),
    ("zeros at the end", Content, Some(ENTRIES), "the line has no end", |v| v.file(&v.segment(2), |bytes| bytes.extend([0; 4096]))),
    ("an entry added", BadSigner, Some(ENTRIES), "nothing signed covers", |v| {
        v.lines(LAST, |lines, at| lines.push(lines[at].replace("\"index\":299", "\"index\":300")));
    }),
    ("a commit added with another key", BadSigner, Some(ENTRIES), "another key", |v| {
        let mut walk = Walk::new(v.dir.path()).unwrap();
        while walk.next().unwrap().is_some() {}
        v.lines(LAST, |lines, at| {
            let line = lines[at].replace("\"index\":299", "\"index\":300");
            walk.tree().append(tree::leaf_hash(line.as_bytes()));
            let checkpoint = note::sign(TestSigner::new(9).as_ref(), ORIGIN, walk.tree().head()).unwrap();
            lines.extend([line, checkpoint_line(&checkpoint, ENTRIES)]);
        });
    }),
    // Segments.
    ("the first segment removed", Content, Some(0), "no entry says that they were given up", |v| fs::remove_file(v.segment(0)).unwrap()),
    ("a segment in the middle removed", Content, None, "the segment begins with entry", |v| fs::remove_file(v.segment(1)).unwrap()),
    ("the last segment removed", Completeness, None, "are missing", |v| fs::remove_file(v.segment(2)).unwrap()),
    ("all segments removed", Completeness, Some(0), "those from 0 on are missing", |v| {
        (0..3).rev().for_each(|number| fs::remove_file(v.segment(number)).unwrap());
    }),
    ("a segment emptied", Content, None, "the segment begins with entry", |v| fs::write(v.segment(1), "").unwrap()),
    ("two segments swapped", Content, None, "index is", |v| {
        let (one, two) = (fs::read(v.segment(1)).unwrap(), fs::read(v.segment(2)).unwrap());
        fs::write(v.segment(1), two).unwrap();
        fs::write(v.segment(2), one).unwrap();
    }),
    ("a segment named for another entry", Content, None, "the segment begins with entry 101", |v| {
        fs::rename(v.segment(1), segment::segment_path(v.dir.path(), 101)).unwrap();
    }),
    ("a segment with an odd name", Content, Some(0), "not one of a segment", |v| {
        fs::write(v.dir.path().join("audit-7.jsonl"), "").unwrap()
    }),
    ("a segment cut between two commits", Content, None, "the segment begins with entry", |v| v.lines(10, |lines, at| lines.truncate(at))),
    ("a segment cut between entry and checkpoint", Content, None, "ends without a checkpoint", |v| {
        v.lines(10, |lines, at| lines.truncate(at + 1))
    }),
    ("a link instead of a segment", Content, None, "cannot open", |v| {
        let path = v.segment(1);
        fs::rename(&path, v.dir.path().join("moved")).unwrap();
        std::os::unix::fs::symlink(v.dir.path().join("moved"), &path).unwrap();
    }),
    ("a directory instead of a segment", Content, None, "cannot open", |v| {
        let path = v.segment(1);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
    }),
    // Checkpoints between the entries.
    ("a checkpoint removed", Content, Some(33), "the one before here is of 33", |v| v.lines(33, |lines, at| drop(lines.remove(at + 1)))),
    ("a checkpoint doubled", Content, Some(34), "follows one of 33", |v| {
        v.lines(33, |lines, at| lines.insert(at + 1, lines[at + 1].clone()))
    }),
    ("what a checkpoint follows changed", Content, Some(33), "follows one of 32", |v| v.behind(33, "\"since\":33", "\"since\":32")),
    ("a checkpoint's size changed", Content, Some(34), "a checkpoint of 35 entries stands behind entry 33", |v| {
        v.behind(33, "\\n34\\n", "\\n35\\n")
    }),
    ("a size with a leading zero", Content, Some(34), "is no size", |v| v.behind(33, "\\n34\\n", "\\n034\\n")),
    ("a checkpoint's root changed", Content, Some(33), "is not the one that its checkpoint covers", |v| {
        let root = v.checkpoint(33).lines().nth(2).unwrap().to_owned();
        let other = note::base64(&[7; 32]);
        v.behind(33, &root, &other);
    }),
    ("a root that is no base64", Content, Some(34), "not the base64 of a SHA-256", |v| v.behind(33, "=\\n\\n", "\\n\\n")),
    ("a line added to a checkpoint", Content, Some(34), "and no other", |v| v.behind(33, "=\\n\\n", "=\\nmore\\n\\n")),
    ("a signature changed", BadSigner, Some(33), "bad signature", |v| {
        let text = v.checkpoint(33);
        let good = text.trim_end().rsplit(' ').next().unwrap().to_owned();
        let mut blob = note::unbase64(&good).unwrap();
        blob[40] ^= 1;
        v.behind(33, &good, &note::base64(&blob));
    }),
    ("a signature cut short", BadSigner, Some(33), "bad signature", |v| {
        let text = v.checkpoint(33);
        let good = text.trim_end().rsplit(' ').next().unwrap().to_owned();
        let blob = note::unbase64(&good).unwrap();
        v.behind(33, &good, &note::base64(&blob[..60]));
    }),
    ("a signature of another checkpoint", BadSigner, Some(33), "bad signature", |v| {
        let of = |index| v.checkpoint(index).trim_end().rsplit(' ').next().unwrap().to_owned();
        v.behind(33, &of(33), &of(34));
    }),
    ("a key id changed", BadSigner, Some(33), "another key", |v| {
        let good = v.checkpoint(33).trim_end().rsplit(' ').next().unwrap().to_owned();
        let mut blob = note::unbase64(&good).unwrap();
        blob[0] ^= 1;
        v.behind(33, &good, &note::base64(&blob));
    }),
    ("a key's name changed", BadSigner, Some(33), "another key", |v| v.behind(33, "— sealane/dc1", "— sealane/dc9")),
    ("an origin changed", BadSigner, Some(33), "bad signature", |v| v.behind(33, "sealane/dc1", "sealane/dc9")),
    ("a second signature", BadSigner, Some(33), "has 2 signatures", |v| {
        let line = format!("{}\\n", v.checkpoint(33).trim_end().rsplit('\n').next().unwrap());
        v.behind(33, &line, &line.repeat(2));
    }),
    ("no signature", Content, Some(34), "is no signed note", |v| {
        let line = format!("\\n{}\\n", v.checkpoint(33).trim_end().rsplit('\n').next().unwrap());
        v.behind(33, &line, "");
    }),
    ("a field added to a checkpoint line", Content, Some(34), "expected `checkpoint` and `since`", |v| {
        v.behind(33, ",\"since\"", ",\"other\":1,\"since\"")
    }),
    ("a commit signed anew with another key", BadSigner, Some(33), "another key", |v| {
        let (old, head) = (v.checkpoint(33), note::read(&v.checkpoint(33)).unwrap().head());
        let other = note::sign(TestSigner::new(9).as_ref(), ORIGIN, head).unwrap();
        let quoted = |text: &str| serde_json::to_string(text).unwrap();
        v.behind(33, &quoted(&old), &quoted(&other.text));
    }),
    ("a commit signed anew for another log", BadSigner, Some(LAST), "is of log `sealane/other`, those before are of", |v| {
        // With the log's own key, and as the last one.
        let (old, head) = (v.checkpoint(LAST), v.head().head());
        let other = note::sign(TestSigner::new(1).as_ref(), "sealane/other", head).unwrap();
        let quoted = |text: &str| serde_json::to_string(text).unwrap();
        v.behind(LAST, &quoted(&old), &quoted(&other.text));
        v.publish(1, "sealane/other", head);
    }),
    ("a commit in the middle signed anew for another log", BadSigner, Some(33), "is of log `sealane/other`, those before are of", |v| {
        let (old, head) = (v.checkpoint(33), note::read(&v.checkpoint(33)).unwrap().head());
        let other = note::sign(TestSigner::new(1).as_ref(), "sealane/other", head).unwrap();
        let quoted = |text: &str| serde_json::to_string(text).unwrap();
        v.behind(33, &quoted(&old), &quoted(&other.text));
    }),
    // The file `checkpoint`.
    ("the checkpoint removed", BadSigner, None, "there is no checkpoint", |v| fs::remove_file(v.published()).unwrap()),
    ("the checkpoint emptied", BadSigner, None, "there is no checkpoint", |v| fs::write(v.published(), "").unwrap()),
    ("the checkpoint cut", BadSigner, None, "no signed note", |v| v.file(&v.published(), |bytes| bytes.truncate(60))),
    ("the checkpoint with something behind it", BadSigner, None, "no signature line", |v| {
        v.file(&v.published(), |bytes| bytes.extend(b"x\n"))
    }),
    ("the checkpoint with CR LF", BadSigner, None, "control character", |v| v.file(&v.published(), text(|t| t.replace('\n', "\r\n")))),
    ("the checkpoint's signature changed", BadSigner, None, "bad signature", |v| {
        let mut blob = note::unbase64(v.head().text.trim_end().rsplit(' ').next().unwrap()).unwrap();
        blob[67] ^= 0x80;
        v.file(&v.published(), text(|t| format!("{} {}\n", t.trim_end().rsplit_once(' ').unwrap().0, note::base64(&blob))));
    }),
    ("the checkpoint's size changed", BadSigner, None, "bad signature", |v| {
        v.file(&v.published(), text(|t| t.replace("\n300\n", "\n290\n")))
    }),
    ("an older checkpoint", BadSigner, Some(290), "it is an older one", |v| fs::write(v.published(), v.checkpoint(289)).unwrap()),
    ("a checkpoint of another key", BadSigner, None, "another key", |v| v.publish(9, ORIGIN, v.head().head())),
    ("a checkpoint of another log", BadSigner, Some(0), "the checkpoint is of log `sealane/other`", |v| {
        v.publish(1, "sealane/other", v.head().head())
    }),
    ("a checkpoint over other entries", BadSigner, Some(LAST), "over other entries", |v| {
        v.publish(1, ORIGIN, Head { size: ENTRIES, root: [7; 32] })
    }),
    ("a checkpoint over more entries", Completeness, Some(ENTRIES), "covers 301 entries", |v| {
        v.publish(1, ORIGIN, Head { size: 301, root: [7; 32] })
    }),
    ("a link instead of the checkpoint", BadSigner, None, "cannot read", |v| {
        fs::rename(v.published(), v.dir.path().join("moved")).unwrap();
        std::os::unix::fs::symlink(v.dir.path().join("moved"), v.published()).unwrap();
    }),
    ("everything signed anew with another key", BadSigner, Some(0), "another key", |v| {
        fs::remove_dir_all(v.dir.path()).unwrap();
        copy(written(4).path(), v.dir.path());
        super::tamper::forge(v.dir.path(), &TestSigner::new(9));
    }),
    // Tiles and bundles.
    ("a hash in a full tile changed", Content, Some(100), "hash 100 of the tile", |v| v.tile(FULL, |bytes| bytes[100 * 32 + 5] ^= 1)),
    ("a full tile cut", Content, Some(0), "expected 8192", |v| v.tile(FULL, |bytes| bytes.truncate(8191))),
    ("a full tile too long", Content, Some(0), "longer than", |v| v.tile(FULL, |bytes| bytes.push(0))),
    ("a full tile removed", Content, Some(0), "No such file", |v| fs::remove_file(FULL.path(v.dir.path())).unwrap()),
    ("a hash in the last tile changed", Content, Some(299), "hash 43 of the tile", |v| v.tile(PART, |bytes| bytes[43 * 32] ^= 1)),
    ("the last tile cut", Content, Some(256), "expected 1408", |v| v.tile(PART, |bytes| bytes.truncate(1376))),
    ("a hash of the level above changed", Content, Some(0), "hash 0 of the tile", |v| v.tile(ABOVE, |bytes| bytes[0] ^= 1)),
    ("a tile behind the end", Completeness, Some(ENTRIES), "that the log of 300 does not have", |v| {
        fs::write(Name::hashes(0, 9, 256).path(v.dir.path()), [0; 8192]).unwrap();
    }),
    ("a tile wider than the log", Completeness, Some(ENTRIES), "that the log of 300 does not have", |v| {
        fs::write(Name::hashes(0, 1, 45).path(v.dir.path()), [0; 45 * 32]).unwrap();
    }),
    ("a file that is no tile", Content, Some(0), "not one of a tile", |v| fs::write(v.dir.path().join("tile/0/00"), "").unwrap()),
    ("an entry in a bundle changed", Content, Some(0), "the entry in the bundle is not that of the log", |v| {
        v.tile(BUNDLE, |bytes| bytes[30] ^= 1)
    }),
    ("a length in a bundle changed", Content, Some(0), "bundle", |v| v.tile(BUNDLE, |bytes| bytes[1] ^= 1)),
    ("a bundle cut", Content, Some(255), "in the middle of an entry", |v| v.tile(BUNDLE, |bytes| bytes.truncate(bytes.len() - 1))),
    ("a bundle too long", Content, Some(0), "3 bytes too many", |v| v.tile(BUNDLE, |bytes| bytes.extend([0, 1, 65]))),
    ("a bundle removed", Content, Some(0), "the bundle is missing", |v| fs::remove_file(BUNDLE.path(v.dir.path())).unwrap()),
    ("the last bundle changed", Content, Some(256), "the entry in the bundle", |v| v.tile(BUNDLE_PART, |bytes| bytes[9] ^= 1)),
    ("an entry changed in segment and tile", Content, Some(50), "is not the one that its checkpoint covers", |v| {
        v.entry(50, "\"number\":50", "\"number\":51");
        let (path, at) = v.line_of(50);
        let line = fs::read_to_string(path).unwrap().lines().nth(at).unwrap().to_owned();
        v.tile(FULL, |bytes| bytes[50 * 32..51 * 32].copy_from_slice(&tree::leaf_hash(line.as_bytes())));
    }),
    // A checkpoint from elsewhere.
    ("a kept checkpoint of other entries", Completeness, None, "not those that the given checkpoint covers", |v| {
        v.give(1, ORIGIN, Head { size: 200, root: [7; 32] })
    }),
    ("a kept checkpoint of more entries", Completeness, Some(ENTRIES), "covers 310 entries", |v| {
        v.give(1, ORIGIN, Head { size: 310, root: [7; 32] })
    }),
    ("a kept checkpoint of another log", Completeness, None, "is of log `sealane/other`", |v| v.give(1, "sealane/other", v.head().head())),
    ("a kept checkpoint of another key", Completeness, None, "another key", |v| v.give(9, ORIGIN, v.head().head())),
    ("a kept checkpoint that was changed", Completeness, None, "bad signature", |v| {
        v.given = Some(v.head().text.replace("\n300\n", "\n299\n"))
    }),
    ("a kept checkpoint that is none", Completeness, None, "no signed note", |v| v.given = Some("nothing".to_owned())),
    // What peers gave.
    ("a proof's hash changed", Witnesses, None, "leads to another root", |v| {
        v.file(
            &v.proof(),
            text(|t| {
                let hash = t.lines().nth(3).unwrap().to_owned();
                t.replacen(&hash, &note::base64(&[7; 32]), 1)
            }),
        );
    }),
    ("a proof's index changed", Witnesses, None, "its entry says that it is 1", |v| {
        v.file(&v.proof(), text(|t| t.replace("index 1", "index 0")))
    }),
    ("a proof without its entry", Witnesses, None, "there is no `extra`", |v| {
        v.file(&v.proof(), text(|t| t.lines().filter(|line| !line.starts_with("extra")).map(|line| format!("{line}\n")).collect()));
    }),
    ("a proof of an entry that was changed", Witnesses, None, "leads to another root", |v| {
        v.file(
            &v.proof(),
            text(|t| {
                let extra = t.lines().nth(1).unwrap().strip_prefix("extra ").unwrap().to_owned();
                let line = String::from_utf8(note::unbase64(&extra).unwrap()).unwrap();
                t.replace(&extra, &note::base64(line.replace("\"run\"", "\"off\"").as_bytes()))
            }),
        );
    }),
    ("a proof with a hash too many", Witnesses, None, "too long", |v| {
        v.file(&v.proof(), text(|t| t.replacen("\n\n", &format!("\n{}\n\n", note::base64(&[7; 32])), 1)));
    }),
    ("a proof with a hash too few", Witnesses, None, "too short", |v| {
        v.file(
            &v.proof(),
            text(|t| {
                let hash = format!("{}\n", t.lines().nth(3).unwrap());
                t.replacen(&hash, "", 1)
            }),
        );
    }),
    ("a proof under another key", Witnesses, None, "another key", |v| {
        v.file(
            &v.proof(),
            text(|t| {
                let head = note::read(t.split_once("\n\n").unwrap().1).unwrap();
                let other = note::sign(TestSigner::new(9).as_ref(), &head.origin, head.head()).unwrap();
                format!("{}\n\n{}", t.split_once("\n\n").unwrap().0, other.text)
            }),
        );
    }),
    ("a proof whose cosignature was changed", Witnesses, None, "bad cosignature", |v| {
        v.file(&v.proof(), |bytes| {
            let at = bytes.len() - 12;
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        })
    }),
    ("a proof whose cosignature was taken away", Witnesses, None, "no cosignature of the given key", |v| {
        v.file(&v.proof(), text(|t| t.lines().take(t.lines().count() - 1).map(|line| format!("{line}\n")).collect()));
    }),
    ("a proof in the place of another", Witnesses, None, "is the one that belongs into `0202", |v| {
        fs::copy(v.proof(), v.proof().with_file_name(format!("{}-run.tlog-proof", MigrationId([3; 16])))).unwrap();
    }),
    ("a proof called after another record", Witnesses, None, "belongs into `0202", |v| {
        fs::rename(v.proof(), v.proof().with_file_name(format!("{MIGRATION}-commit.tlog-proof"))).unwrap();
    }),
    ("a proof of another version", Witnesses, None, "first line", |v| v.file(&v.proof(), text(|t| t.replace("@v1", "@v2")))),
    ("a proof cut", Witnesses, None, "no empty line", |v| v.file(&v.proof(), |bytes| bytes.truncate(100))),
];

fn report(dir: &Path, given: Option<String>) -> VerifyReport {
    let options = VerifyOptions {
        public_key: Some(TestSigner::new(1).public_key()),
        checkpoint: given,
        witness_keys: vec![TestSigner::new(2).public_key()],
    };
    verify(dir, &options)
}

#[test]
fn every_damage_is_refused_for_its_own_reason() {
    let whole = report(GOOD.path(), Some(fs::read_to_string(GOOD.path().join("checkpoint")).unwrap()));
    for verdict in [&whole.content, &whole.signer, &whole.completeness, &whole.witnesses] {
        assert!(matches!(verdict, Verdict::Good(_)), "{whole:?}");
    }
    assert_eq!(segment::list(GOOD.path()).unwrap().len(), 3);
    let mut wrong = Vec::new();
    for (what, says, entry, words, damage) in CASES {
        let mut victim = Victim { dir: tempdir(), given: None };
        copy(GOOD.path(), victim.dir.path());
        damage(&mut victim);
        let report = report(victim.dir.path(), victim.given.clone());
        let verdict = match says {
            Content => &report.content,
            BadSigner => &report.signer,
            Completeness => &report.completeness,
            Witnesses => &report.witnesses,
        };
        let right = matches!(verdict, Verdict::Bad { entry: named, why } if (entry.is_none() || named == entry) && why.contains(words));
        // Whoever speaks first names the damage; content comes first.
        let others_first = *says != Content && report.content.is_bad();
        if !right || others_first {
            wrong.push(format!("{what}: expected {says:?} at {entry:?}: {words}\n  {report:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} damages:\n{}", wrong.len(), CASES.len(), wrong.join("\n"));
    assert!(CASES.len() >= 100, "{}", CASES.len());
}
