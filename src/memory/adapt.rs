//! How hard to try: from what packing and sending take, one lane at a time.
//!
//! A byte of page content takes `1 / packing rate` on the thread that packs, `ratio / sending rate` on the one that sends (the same
//! without a codec), and `ratio / link rate` on the link. The effort with which the longest of these is least is the best.
//!
//! Packing rates are measured for the efforts that were used, processors that others use included; those of the others, and how much
//! is left of the pages at hand, are taken from how much faster or slower, and larger or smaller, they came out than in the table
//! below. What an effort brought some time ago is no measure: the pages were others.
//!
//! Where processors are short, whoever packs takes them from whoever sends, perhaps at both ends. What arrives in a second then
//! says little of the link: only that it takes at least so much. So a short path is taken for a fast network until that has not
//! shown for a second, or lanes wait for it while processors are there.

use std::time::Duration;

use crate::memory::Effort;

/// Efforts with what they do to a real guest's memory on one core: bytes packed a second, and what is left of a byte.
const LADDER: [(Effort, f64, f64); 6] = [
    (Effort::None, 6e9, 1.0),
    (Effort::Lz4, 1.2e9, 0.46),
    (Effort::Zstd(1), 0.6e9, 0.325),
    (Effort::Zstd(3), 0.3e9, 0.305),
    (Effort::Zstd(6), 0.15e9, 0.29),
    (Effort::Zstd(9), 0.07e9, 0.282),
];

/// Bytes that a lane's thread encrypts and hands to the kernel in a second.
const SENDING: f64 = 3e9;
/// WHY: frames differ too much for less to mean something, and another effort costs the codec what it has seen; a change is to be
/// answered within a second.
const PERIOD: Duration = Duration::from_millis(100);
/// WHY: a second; processors may be used by others then, or by them no more.
const PERIODS_TRUSTED: u32 = 10;
/// WHY: another effort loses what the codec has seen, so it has to be better by this.
const GAIN: f64 = 0.93;
/// WHY: from here on packing is work for nothing; trials tell when that changes.
const INCOMPRESSIBLE: f64 = 0.95;
/// WHY: a window doubles in each round trip until it has found the path, and what is sent until then says nothing of it.
const FINDING_ROUND_TRIPS: u32 = 12;
/// Round trips of at least this are a link that is worth packing for before it is known.
const LONG: Duration = Duration::from_millis(4);
/// Part of the time that a lane's thread was ready to run and had to wait, from which on processors are short. They are short too where
/// less than that of the host's is idle.
const CONTENDED: f64 = 0.1;
/// WHY: a short path that carries more bytes a second than 1 Gbit/s is of a network that carries several times as many.
const FAST_NETWORK: f64 = 150e6;

/// What is known of one lane.
#[derive(Debug, Clone)]
pub struct Adaptation {
    at: usize,
    /// Packing here over packing in the table, as a speed.
    speed: f64,
    /// What is left here over what is left in the table.
    left: f64,
    /// Bytes a second that the link takes.
    link: f64,
    /// Bytes that all lanes on the path had sent at the last decision.
    all_sent: u64,
    short: bool,
    /// For so many decisions yet the path is one of a fast network.
    fast: u32,
    /// Whether anything was learned yet.
    learned: bool,
    /// Whether processors were short in the last period.
    contended: bool,
    /// Until the path has been found nothing is learned.
    finding: Duration,
    /// Bytes of content a second that each effort packs, and how many periods ago it was used.
    rates: [(f64, u32); LADDER.len()],
    /// Since the last decision.
    packing: Duration,
    waiting: Duration,
    delayed: Duration,
    content: u64,
    wire: u64,
}

/// A frame that went out.
#[derive(Debug, Clone, Copy, Default)]
pub struct FrameSent {
    /// Spent to make it.
    pub packing: Duration,
    /// Until there was room for it.
    pub waiting: Duration,
    /// Of all that, ready to run and without a processor.
    pub delayed: Duration,
    /// Bytes of pages that went through the codec.
    pub content: u64,
    /// Bytes of the frame.
    pub wire: u64,
    /// Bytes a second that congestion control holds the path for.
    pub path: u64,
    /// The shortest round trip that anybody on the path has seen.
    pub round_trip: Duration,
    /// Bytes that all lanes on the path have sent until now.
    pub all_sent: u64,
    /// Part of the host's processors that was busy lately.
    pub busy: f64,
}

impl Adaptation {
    /// For a lane on a path with this round trip, on which so many bytes were sent until now.
    #[must_use]
    pub fn new(round_trip: Duration, all_sent: u64) -> Self {
        let at = if round_trip >= LONG { 2 } else { 0 };
        Self {
            at,
            speed: 1.0,
            left: 1.0,
            link: 0.0,
            all_sent,
            short: round_trip < LONG,
            fast: if round_trip < LONG { PERIODS_TRUSTED } else { 0 },
            learned: false,
            contended: false,
            finding: if round_trip >= LONG { round_trip * FINDING_ROUND_TRIPS } else { Duration::ZERO },
            rates: [(0.0, u32::MAX); LADDER.len()],
            packing: Duration::ZERO,
            waiting: Duration::ZERO,
            delayed: Duration::ZERO,
            content: 0,
            wire: 0,
        }
    }

    /// What another lane on the path has learned, for one that begins when so many bytes were sent.
    #[must_use]
    pub fn begun_anew(mut self, all_sent: u64) -> Self {
        self.forget_frames(all_sent);
        self
    }

    fn forget_frames(&mut self, all_sent: u64) {
        (self.packing, self.waiting, self.delayed) = Default::default();
        (self.content, self.wire, self.all_sent) = (0, 0, all_sent);
    }

    /// How hard to try now.
    #[must_use]
    pub fn effort(&self) -> Effort {
        LADDER.get(self.at).map_or(Effort::None, |(effort, ..)| *effort)
    }

    /// Takes a frame. True when something was learned.
    pub fn sent(&mut self, frame: &FrameSent) -> bool {
        if !self.short && frame.round_trip < LONG {
            // A lane that gets no processor takes a short path for a long one.
            (self.short, self.fast, self.finding) = (true, PERIODS_TRUSTED, Duration::ZERO);
            if !self.learned {
                self.at = 0;
            }
        }
        self.finding = self.finding.saturating_sub(frame.packing + frame.waiting);
        if !self.finding.is_zero() {
            return false;
        }
        self.packing += frame.packing;
        self.waiting += frame.waiting;
        self.delayed += frame.delayed;
        self.content += frame.content;
        self.wire += frame.wire;
        if self.packing + self.waiting < PERIOD || self.content == 0 {
            return false;
        }
        self.learn(frame);
        self.choose();
        self.learned = true;
        self.forget_frames(frame.all_sent);
        true
    }

    /// A batch of `content` bytes that went out unpacked was packed with LZ4 as a trial, to so many bytes, in this time.
    pub fn probed(&mut self, content: usize, packed: usize, took: Duration) {
        let [_, (_, rate, left), ..] = LADDER;
        if content > 0 && !took.is_zero() {
            blend(&mut self.speed, content as f64 / took.as_secs_f64() / rate);
            blend(&mut self.left, packed as f64 / content as f64 / left);
        }
    }

    fn learn(&mut self, frame: &FrameSent) {
        let Some((_, rate, left)) = LADDER.get(self.at) else { return };
        let (packing, waiting, path) = (self.packing.as_secs_f64(), self.waiting.as_secs_f64(), frame.path as f64);
        for (at, (known, age)) in self.rates.iter_mut().enumerate() {
            *age = age.saturating_add(1);
            if at == self.at {
                let measured = self.content as f64 / packing.max(1e-6);
                (*known, *age) = (if *age <= PERIODS_TRUSTED { known.mul_add(0.5, measured * 0.5) } else { measured }, 0);
            }
        }
        if self.at > 0 {
            blend(&mut self.speed, self.content as f64 / packing.max(1e-6) / rate);
            blend(&mut self.left, self.wire as f64 / self.content as f64 / left);
        }
        let throughput = self.wire as f64 / (packing + waiting);
        // A lane that waits most of the time waits for the link, and this is what it takes. Any other fills buffers that the link has
        // yet to empty; it knows from congestion control what the link takes.
        self.link = if waiting > packing || path == 0.0 { throughput } else { path };
        self.contended = self.delayed.as_secs_f64() > (packing + waiting) * CONTENDED || frame.busy > 1.0 - CONTENDED;
        self.fast = match frame.all_sent.saturating_sub(self.all_sent) as f64 / (packing + waiting) {
            all if self.short && all > FAST_NETWORK => PERIODS_TRUSTED,
            _ if self.contended => self.fast.saturating_sub(1),
            _ => 0,
        };
        if self.contended && self.fast > 0 {
            self.link = f64::INFINITY;
        }
    }

    fn choose(&mut self) {
        let takes = |at: usize| {
            let (_, rate, left) = LADDER.get(at).copied().unwrap_or((Effort::None, 1.0, 1.0));
            if at == 0 {
                return (1.0 / rate + 1.0 / SENDING).max(1.0 / self.link);
            }
            let rate = match self.rates.get(at) {
                Some((known, 0..=PERIODS_TRUSTED)) => *known,
                _ => rate * self.speed,
            };
            let left = (left * self.left).min(1.0);
            let (packing, sending) = (1.0 / rate, left / SENDING);
            if self.contended { packing + sending } else { packing.max(sending) }.max(left / self.link)
        };
        // Whatever is tried: without a codec LZ4 is, now and then.
        let [_, lz4, ..] = LADDER;
        let (_, _, left) = LADDER.get(self.at).copied().filter(|_| self.at > 0).unwrap_or(lz4);
        if left * self.left > INCOMPRESSIBLE {
            self.at = 0;
            return;
        }
        // A lane that packs most of the time has none for more of it.
        let most = if self.packing > self.waiting { self.at + 1 } else { LADDER.len() };
        let best = (0..most).min_by(|one, other| takes(*one).total_cmp(&takes(*other))).unwrap_or(0);
        if takes(best) < takes(self.at) * GAIN {
            self.at = best;
        }
    }
}

/// What was measured last counts most.
fn blend(known: &mut f64, measured: f64) {
    *known = known.mul_add(0.25, measured.clamp(1e-3, 1e3) * 0.75);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lane whose processor is so many times as fast as the table's, on a link of so many bytes a second, with pages of which so
    /// much more is left than in the table: its effort after `seconds`.
    fn after(adaptation: &mut Adaptation, speed: f64, link: f64, left: f64, seconds: f64) -> Effort {
        delayed_after(adaptation, speed, link, left, seconds, 0.0)
    }

    /// The same where the lane's thread waits for a processor for so much of the time.
    fn delayed_after(adaptation: &mut Adaptation, speed: f64, link: f64, left: f64, seconds: f64, delayed: f64) -> Effort {
        let end = seconds;
        let mut time = 0.0;
        let mut frames = 0;
        let mut all_sent = adaptation.all_sent;
        while time < end {
            let (_, rate, ratio) = LADDER[adaptation.at];
            let ratio = if adaptation.at == 0 { 1.0 } else { (ratio * left).min(1.0) };
            let content = 512.0 * 1024.0 / ratio;
            let alone = if adaptation.at == 0 { content / SENDING } else { 0.0 };
            let packing = content / (rate * speed) + alone;
            // What is sent meanwhile need not be waited for.
            let waiting = (content * ratio / link - packing).max(0.0);
            let seconds = Duration::from_secs_f64;
            time += packing + waiting;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a test's figures")]
            let (content, path) = (content as u64, link as u64);
            // A second lane sends as much.
            all_sent += 2 * 512 * 1024;
            let (packing, waiting) = (seconds(packing), seconds(waiting));
            let delayed = (packing + waiting).mul_f64(delayed);
            adaptation.sent(&FrameSent {
                packing,
                waiting,
                delayed,
                content,
                wire: 512 * 1024,
                path,
                round_trip: LONG,
                all_sent,
                busy: 0.0,
            });
            frames += 1;
            if adaptation.at == 0 && frames % 16 == 0 {
                let took = 262_144.0 / (LADDER[1].1 * speed);
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a test's figures")]
                adaptation.probed(262_144, (262_144.0 * (LADDER[1].2 * left).min(1.0)) as usize, Duration::from_secs_f64(took));
            }
        }
        adaptation.effort()
    }

    #[test]
    fn a_slow_link_is_worth_a_strong_codec_and_a_fast_one_none() {
        let short = || Adaptation::new(Duration::from_micros(100), 0);
        let long = || Adaptation::new(Duration::from_millis(50), 0);
        for (what, link, efforts) in [
            ("loopback", 2e9, &[Effort::None][..]),
            ("10 Gbit/s", 1.25e9, &[Effort::None, Effort::Lz4]),
            ("1 Gbit/s", 125e6, &[Effort::Zstd(1), Effort::Zstd(3)]),
            ("100 Mbit/s", 12.5e6, &[Effort::Zstd(6), Effort::Zstd(9)]),
        ] {
            for (from, adaptation) in [("short", short()), ("long", long())] {
                let mut adaptation = adaptation;
                let effort = after(&mut adaptation, 1.0, link, 1.0, 1.0);
                assert!(efforts.contains(&effort), "{what}, begun as on a {from} path: {effort:?}");
            }
        }
    }

    #[test]
    fn a_link_that_changes_is_answered_within_a_second() {
        let mut adaptation = Adaptation::new(Duration::from_micros(100), 0);
        assert_eq!(after(&mut adaptation, 1.0, 2e9, 1.0, 1.0), Effort::None);
        assert!(matches!(after(&mut adaptation, 1.0, 50e6, 1.0, 1.0), Effort::Zstd(_)));
        assert_eq!(after(&mut adaptation, 1.0, 3e9, 1.0, 1.0), Effort::None);
    }

    #[test]
    fn what_packs_takes_the_processor_from_what_sends_where_there_are_too_few() {
        let short = || Adaptation::new(Duration::from_micros(100), 0);
        // As much as half of two slow processors sends and receives.
        assert_ne!(after(&mut short(), 0.4, 200e6, 1.0, 2.0), Effort::None);
        assert_eq!(delayed_after(&mut short(), 0.4, 200e6, 1.0, 2.0, 0.2), Effort::None);
        // Of a slow network that is no reason.
        assert_ne!(delayed_after(&mut short(), 0.4, 50e6, 1.0, 2.0, 0.2), Effort::None);
        let mut long = Adaptation::new(Duration::from_millis(50), 0);
        assert_ne!(delayed_after(&mut long, 0.4, 60e6, 1.0, 2.0, 0.2), Effort::None);
    }

    #[test]
    fn many_slow_lanes_on_a_fast_network_are_no_reason_to_pack() {
        let mut one_of_eight = Adaptation::new(Duration::from_micros(100), 0);
        let mut all_sent = 0;
        for frame in 0..400 {
            // 30 MB/s of 240, on a host without an idle processor.
            all_sent += 8 << 19;
            let (packing, waiting) = (Duration::from_micros(200), Duration::from_millis(17));
            let wire = 1 << 19;
            one_of_eight.sent(&FrameSent {
                packing,
                waiting,
                delayed: Duration::ZERO,
                content: wire,
                wire,
                path: 1 << 30,
                round_trip: LONG,
                all_sent,
                busy: 1.0,
            });
            if frame % 16 == 0 {
                one_of_eight.probed(1 << 18, 1 << 16, Duration::from_micros(300));
            }
        }
        assert_eq!(one_of_eight.effort(), Effort::None);
    }

    #[test]
    fn a_network_is_fast_until_it_does_not_show_for_a_second() {
        let mut adaptation = Adaptation::new(Duration::from_micros(100), 0);
        assert_eq!(delayed_after(&mut adaptation, 0.4, 40e6, 1.0, 0.5, 0.2), Effort::None, "processors are short, and nobody knows");
        assert_ne!(delayed_after(&mut adaptation, 0.4, 40e6, 1.0, 1.0, 0.2), Effort::None);
        // Lanes that wait while processors are there wait for the link.
        let mut adaptation = Adaptation::new(Duration::from_micros(100), 0);
        after(&mut adaptation, 0.4, 40e6, 1.0, 0.3);
        assert_ne!(delayed_after(&mut adaptation, 0.4, 40e6, 1.0, 0.2, 0.2), Effort::None);
    }

    #[test]
    fn a_path_that_seemed_long_while_processors_were_short_is_taken_for_short() {
        let mut adaptation = Adaptation::new(Duration::from_millis(50), 0);
        assert_eq!(adaptation.effort(), Effort::Zstd(1));
        adaptation.sent(&FrameSent { round_trip: Duration::from_millis(1), ..FrameSent::default() });
        assert_eq!(adaptation.effort(), Effort::None);
    }

    #[test]
    fn incompressible_pages_go_out_as_they_are() {
        for link in [2e9, 125e6, 12.5e6] {
            let mut adaptation = Adaptation::new(Duration::from_millis(50), 0);
            let effort = after(&mut adaptation, 1.0, link, 4.0, 2.0);
            let (_, rate, _) = LADDER[adaptation.at];
            assert!(effort == Effort::None || rate > link * 3.0, "{link}: {effort:?}");
        }
    }

    #[test]
    fn a_processor_that_is_busy_tries_less() {
        let mut adaptation = Adaptation::new(Duration::from_millis(50), 0);
        let effort = after(&mut adaptation, 0.1, 125e6, 1.0, 2.0);
        assert!(matches!(effort, Effort::None | Effort::Lz4), "{effort:?}");
    }
}
