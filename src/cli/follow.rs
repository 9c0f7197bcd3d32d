//! Follows a migration to its end: progress, Ctrl-C, the report.

use std::future::Future;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Ending;
use super::output::{Out, Tone};
use super::render;
use crate::control::{Client, ClientError, Event, Exit, Watch, exit_of_report};
use crate::telemetry::{ErrorClass, Monotone, Phase, Problem, Progress, Report, RunningOn};
use crate::types::MigrationId;

/// What Ctrl-C does, and what has been pressed.
#[derive(Debug)]
pub(super) struct Interrupts {
    /// `None`: Ctrl-C ends the command as it ends any other.
    signal: Option<Signal>,
    pressed: bool,
}

impl Interrupts {
    /// Ctrl-C ends this command; the migration goes on.
    pub(super) fn end_the_command() -> Self {
        Self { signal: None, pressed: false }
    }

    /// The first Ctrl-C cancels the migration, the second ends the command.
    pub(super) fn cancel_then_detach() -> Result<Self, Problem> {
        let signal = signal(SignalKind::interrupt());
        let signal = signal.map_err(|error| Problem::new(ErrorClass::Local, format!("cannot listen for Ctrl-C: {error}")))?;
        Ok(Self { signal: Some(signal), pressed: false })
    }

    /// Waits for the next Ctrl-C.
    async fn next(&mut self) {
        match &mut self.signal {
            Some(signal) => {
                signal.recv().await;
            }
            None => std::future::pending().await,
        }
    }

    /// Waits for work through the first Ctrl-C, which is remembered; the second gives the work up.
    pub(super) async fn through<T>(&mut self, work: impl Future<Output = T>, out: Out) -> Option<T> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                value = &mut work => return Some(value),
                () = self.next() => {}
            }
            if self.pressed {
                return None;
            }
            self.pressed = true;
            out.talk("will cancel as soon as the gateway answers; press Ctrl-C again to leave it alone");
        }
    }
}

/// Shows progress until the migration has ended; the exit code is the migration's. With `events` every event is a
/// JSON line.
pub(super) async fn follow(client: &Client, id: MigrationId, out: Out, events: bool, interrupts: Interrupts) -> Ending {
    let mut follower = Follower { client, id, out, events, interrupts, monotone: Monotone::new(), meter: Meter::new(out.live) };
    let report = follower.until_the_end().await;
    out.live_end();
    let Some(report) = report? else { return Ok(detached(id, out)) };
    if out.json {
        out.object(&report);
    } else {
        out.data(&render::report(out, &report));
    }
    if let Some(error) = &report.error {
        out.say_problem(error);
    }
    Ok(exit_of_report(&report))
}

fn detached(id: MigrationId, out: Out) -> Exit {
    out.talk(&format!("detached; `sealane status {}` tells how it ends", render::short(id)));
    Exit::Unknown
}

struct Follower<'a> {
    client: &'a Client,
    id: MigrationId,
    out: Out,
    events: bool,
    interrupts: Interrupts,
    monotone: Monotone,
    meter: Meter,
}

/// How often a gateway that went away is asked again, a second apart: it may be restarting.
const PATIENCE: u32 = 15;

enum Happened {
    Event(Result<Option<Event>, ClientError>),
    Interrupt,
}

impl Follower<'_> {
    /// The report, or nothing after the second Ctrl-C.
    async fn until_the_end(&mut self) -> Result<Option<Box<Report>>, Problem> {
        let started = Instant::now();
        let mut watch = self.client.watch(self.id).await.map_err(|error| error.problem())?;
        if self.interrupts.pressed && self.cancel().await {
            return Ok(None);
        }
        loop {
            let happened = tokio::select! {
                event = watch.next() => Happened::Event(event),
                () = self.interrupts.next() => Happened::Interrupt,
            };
            match happened {
                Happened::Event(Ok(Some(Event::Report(report)))) => return Ok(Some(report)),
                Happened::Event(Ok(Some(Event::Progress(progress)))) => {
                    let progress = self.monotone.admit(*progress);
                    self.show(&progress, started.elapsed());
                }
                Happened::Event(Err(error @ (ClientError::Answer { .. } | ClientError::Event { .. }))) => {
                    return Err(lost(self.id, &error));
                }
                Happened::Event(event) => {
                    let found = tokio::select! {
                        found = again(self.client, self.id, self.out, event.err(), PATIENCE) => found?,
                        () = self.interrupts.next() => return Ok(None),
                    };
                    watch = found;
                }
                Happened::Interrupt => {
                    if self.interrupts.pressed || self.cancel().await {
                        return Ok(None);
                    }
                }
            }
        }
    }

    fn show(&mut self, progress: &Progress, since_start: Duration) {
        if self.events {
            self.out.object(progress);
        } else if let Some(line) = self.meter.line(progress, since_start) {
            let tone = if progress.stalled_because.is_some() { Tone::Doubtful } else { Tone::Good };
            let line = self.out.paint_talk(tone, &line);
            if self.out.live { self.out.live_line(&line) } else { self.out.talk(&line) }
        }
    }

    /// Asks the gateway to cancel; true when Ctrl-C was pressed again meanwhile.
    async fn cancel(&mut self) -> bool {
        self.interrupts.pressed = true;
        self.out.live_end();
        let answer = tokio::select! {
            answer = self.client.cancel(self.id) => answer,
            () = self.interrupts.next() => return true,
        };
        match answer {
            Ok(_) => self.out.talk("cancelling; press Ctrl-C again to leave it alone"),
            Err(error) => {
                self.out.say_problem(&error.problem());
                self.out.talk("not cancelled; press Ctrl-C again to leave it alone");
            }
        }
        false
    }
}

/// Looks for a gateway that went away.
async fn again(client: &Client, id: MigrationId, out: Out, mut last: Option<ClientError>, patience: u32) -> Result<Watch, Problem> {
    out.live_end();
    out.talk("the gateway went away; looking for it");
    for _ in 0..patience {
        tokio::time::sleep(Duration::from_secs(1)).await;
        match client.watch(id).await {
            Ok(watch) => return Ok(watch),
            Err(ClientError::Refused(problem)) => return Err(forgotten(id, *problem)),
            Err(error) => last = Some(error),
        }
    }
    let last = last.unwrap_or_else(|| ClientError::Silent { socket: client.socket().to_owned(), changes: true });
    Err(lost(id, &last))
}

/// A gateway that came back and knows nothing of a migration has promised nothing for it: its journal is written first.
fn forgotten(id: MigrationId, problem: Problem) -> Problem {
    if problem.code != "unknown-migration" {
        return problem;
    }
    let message = format!("the gateway was restarted before migration `{id}` had begun: its journal knows nothing of it");
    Problem::new(ErrorClass::Local, message).with_code("interrupted").with_running_on(RunningOn::Source)
}

fn lost(id: MigrationId, error: &ClientError) -> Problem {
    let message = format!("lost sight of migration `{id}`: {}", crate::telemetry::chain(error));
    let hint = format!("start the gateway again; its journal knows who owns the VM, and `sealane status {}` then tells", render::short(id));
    Problem::new(ErrorClass::InDoubt, message).with_code("gateway-lost").with_hint(hint)
}

/// Decides when a line of progress is worth printing where lines cannot be replaced.
#[derive(Debug)]
struct Meter {
    live: bool,
    last: Option<(Phase, bool, Duration)>,
}

/// Logs want a sign of life, not a film.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Meter {
    fn new(live: bool) -> Self {
        Self { live, last: None }
    }

    /// The line, if it is time for one: always when it replaces the last; else for a new phase, a stall, or after ten seconds.
    fn line(&mut self, progress: &Progress, now: Duration) -> Option<String> {
        let stalled = progress.stalled_because.is_some();
        let due = match self.last {
            None => true,
            Some((phase, was_stalled, at)) => progress.phase != phase || stalled != was_stalled || now.saturating_sub(at) >= LINE_EVERY,
        };
        if !self.live && !due {
            return None;
        }
        self.last = Some((progress.phase, stalled, now));
        Some(render::progress_line(progress))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(phase: Phase) -> Progress {
        let mut progress = Progress::new(MigrationId([1; 16]));
        progress.phase = phase;
        progress
    }

    #[test]
    fn without_a_terminal_a_line_comes_for_each_phase_and_every_ten_seconds() {
        let mut meter = Meter::new(false);
        let steps = [
            (Phase::Connect, 0),
            (Phase::Memory, 1),
            (Phase::Memory, 2),
            (Phase::Memory, 10),
            (Phase::Memory, 11),
            (Phase::Memory, 12),
            (Phase::Switchover, 13),
        ];
        let printed: Vec<u64> = steps
            .into_iter()
            .filter(|(phase, second)| meter.line(&at(*phase), Duration::from_secs(*second)).is_some())
            .map(|(_, second)| second)
            .collect();
        assert_eq!(printed, [0, 1, 11, 13]);
    }

    #[test]
    fn a_stall_is_said_at_once() {
        let mut meter = Meter::new(false);
        meter.line(&at(Phase::Memory), Duration::ZERO);
        let mut stalled = at(Phase::Memory);
        stalled.stalled_because = Some("the link is down".to_owned());
        let line = meter.line(&stalled, Duration::from_secs(1)).unwrap();
        assert!(line.starts_with("memory 0 %, stalled: the link is down, round 0"), "{line}");
    }

    #[test]
    fn on_a_terminal_every_event_is_shown() {
        let mut meter = Meter::new(true);
        assert!((0..5).all(|_| meter.line(&at(Phase::Memory), Duration::ZERO).is_some()));
    }

    #[tokio::test]
    async fn a_gateway_that_stays_away_leaves_the_outcome_unknown() {
        let client = Client::new("/nonexistent/api.sock");
        let id = MigrationId([0xab; 16]);
        let problem = again(&client, id, Out::new(false), None, 0).await.unwrap_err();
        assert_eq!(crate::control::exit_of(&problem), Exit::Unknown);
        assert!(problem.message.contains(&id.to_string()), "{}", problem.message);
    }
}
