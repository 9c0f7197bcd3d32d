//! Several channels of a QEMU's stream (`multifd`), gathered into the stream of one, which says the same.
//!
//! Its main channel frames the stream; pages come on the others, in packets. Between two places where QEMU has all channels wait for each
//! other, each page comes once, so what order they take does not matter. What comes out has its own sections with pages: QEMU may keep
//! the end of one back until it has got rid of pages.

mod channel;

use super::Unsound;
use super::look::{Look, Stop};
use super::sections::Sections;
use super::walk::{EOS, Expected, Item, MULTIFD_FLUSH, Spot, Walk};
use crate::types::PAGE_BYTES;
use channel::Channel;

/// Gathers.
#[derive(Debug)]
pub struct Gather {
    walk: Walk,
    channels: Vec<Channel>,
    meets: Meets,
    /// Whether they have done so.
    met: bool,
    out: Sections,
}

/// Where all channels wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meets {
    /// What comes first of the two shows it.
    Unknown,
    /// At the end of each section with pages: machine types before 8.1.
    Sections,
    /// Where the stream says so.
    Rounds,
}

impl Gather {
    /// For so many channels besides the main one.
    #[must_use]
    pub fn new(expected: Expected, channels: usize) -> Self {
        let uuid = expected.uuid;
        let walk = Walk::known(Box::new(expected), "a stream that is known to its end, as several channels need");
        let channels = (0..channels).map(|_| Channel::new(uuid)).collect();
        Self { walk, channels, meets: Meets::Unknown, met: false, out: Sections::default() }
    }

    /// Takes the beginning of what the main channel has, as much as may come out now; how much that is.
    ///
    /// # Errors
    /// It is not sound.
    pub fn take_main(&mut self, bytes: &[u8]) -> Result<usize, Unsound> {
        let mut at = 0;
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            match (self.walk.word(rest), self.meets) {
                (Some(MULTIFD_FLUSH), Meets::Unknown | Meets::Rounds) => {
                    self.meets = Meets::Rounds;
                    if !self.let_all_go_on() {
                        return Ok(at);
                    }
                    at += self.walk.skip_word();
                    continue;
                }
                (Some(EOS), Meets::Unknown | Meets::Sections) => {
                    self.meets = Meets::Sections;
                    if !self.let_all_go_on() {
                        return Ok(at);
                    }
                }
                _ => {}
            }
            let before = self.walk.spot();
            let Some(item) = self.walk.next(rest)? else { return Ok(at) };
            at += match (self.out.take(&self.walk, before, item, rest), item) {
                (Some(count), _) => count,
                (None, Item::Tail) if rest.is_empty() => return Ok(at),
                // What follows is sent on the main channel alone.
                (None, _) => {
                    self.out.bytes.extend_from_slice(rest);
                    rest.len()
                }
            };
        }
    }

    /// The same of what another channel has.
    ///
    /// # Errors
    /// It is not sound, or there is no such channel.
    pub fn take_channel(&mut self, index: usize, bytes: &[u8]) -> Result<usize, Unsound> {
        let mut at = 0;
        loop {
            let Some(channel) = self.channels.get_mut(index) else {
                return Err(Unsound { at: 0, expected: "a channel that was asked for", got: format!("channel {index}") });
            };
            let rest = bytes.get(at..).unwrap_or_default();
            let Some(packet) = &mut channel.packet else {
                if channel.waits {
                    return Ok(at);
                }
                let begun = channel.id.is_some();
                match channel.next(rest, &self.walk, self.met) {
                    Ok(count) => at += count,
                    Err(Stop::Short) => return Ok(at),
                    Err(Stop::Unsound(unsound)) => return Err(unsound),
                    Err(Stop::Unknown(why)) => return Err(channel.unsound("packets of pages as they are", why)),
                }
                if !begun {
                    self.ensure_once(index)?;
                }
                continue;
            };
            let Some((place, zero)) = packet.first() else {
                channel.waits = packet.waits;
                channel.packet = None;
                continue;
            };
            match self.walk.spot() {
                Spot::Pages { .. } | Spot::Gap | Spot::Footer { last: false } => {}
                Spot::Ahead | Spot::Setup => return Ok(at),
                Spot::Footer { last: true } | Spot::Behind => return Err(channel.unsound("no page behind the last section", "one")),
            }
            let content = rest.first_chunk::<PAGE_BYTES>();
            if !zero && content.is_none() {
                return Ok(at);
            }
            packet.pop();
            if !zero {
                channel.at += PAGE_BYTES as u64;
                at += PAGE_BYTES;
            }
            self.out.page(&self.walk, place, content.filter(|_| !zero));
        }
    }

    /// What has come out since this was asked last.
    pub fn gathered(&mut self) -> &mut Vec<u8> {
        &mut self.out.bytes
    }

    /// Whether a channel has come where it waits for the others.
    #[must_use]
    pub fn waits(&self, index: usize) -> bool {
        self.channels.get(index).is_some_and(|channel| channel.waits)
    }

    /// The main channel has ended, with so many bytes that were not taken.
    ///
    /// # Errors
    /// It may not end here.
    pub fn end_main(&self, left: usize) -> Result<(), Unsound> {
        self.walk.may_end()?;
        if left > 0 {
            return Err(Unsound { at: 0, expected: "the end of the stream", got: format!("{left} bytes more") });
        }
        Ok(())
    }

    /// Another channel has ended, with so many bytes that were not taken.
    ///
    /// # Errors
    /// It may not end here.
    pub fn end_channel(&self, index: usize, left: usize) -> Result<(), Unsound> {
        let Some(channel) = self.channels.get(index) else { return Ok(()) };
        let over = matches!(self.walk.spot(), Spot::Footer { last: true } | Spot::Behind);
        if over && left == 0 && channel.packet.is_none() {
            return Ok(());
        }
        Err(channel.unsound("pages until the last section has ended", &format!("the end of the channel, and {left} bytes in front of it")))
    }

    /// A channel that has said which it is, is no other.
    fn ensure_once(&self, index: usize) -> Result<(), Unsound> {
        let Some(channel) = self.channels.get(index) else { return Ok(()) };
        let twice = self.channels.iter().filter(|other| other.id == channel.id).count() > 1;
        if twice { Err(channel.unsound("channels, each once", "it twice")) } else { Ok(()) }
    }

    /// Whether all channels had come here; then they go on.
    fn let_all_go_on(&mut self) -> bool {
        let all = self.channels.iter().all(|channel| channel.waits);
        if all {
            self.met = true;
            self.channels.iter_mut().for_each(|channel| channel.waits = false);
        }
        all
    }
}
