//! Follows a migration to its end: progress, Ctrl-C, the report.

use std::time::{Duration, Instant};

use super::Ending;
use super::output::{Out, Tone};
use super::render;
use crate::control::{Client, ClientError, Event, Exit, Watch, exit_of_report};
use crate::telemetry::{ErrorClass, Monotone, Phase, Problem, Progress, Report};
use crate::types::MigrationId;

/// What Ctrl-C does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interrupts {
    /// Ends this command; the migration goes on.
    EndTheCommand,
    /// The first cancels the migration, the second ends the command.
    CancelThenDetach,
}

/// How a migration is followed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Style {
    /// Whether every event is printed as one JSON line.
    pub(super) events: bool,
    /// What Ctrl-C does.
    pub(super) interrupts: Interrupts,
}

/// Shows progress until the migration has ended; the exit code is the migration's.
pub(super) async fn follow(client: &Client, id: MigrationId, out: Out, style: Style) -> Ending {
    let mut follower = Follower { client, id, out, style, cancelling: false, monotone: Monotone::new(), meter: Meter::new(out.live) };
    let report = follower.to_the_end(PATIENCE).await;
    out.live_end();
    let Some(report) = report? else {
        out.talk(&format!("detached; `sealane status {}` tells how it ends", render::short(id)));
        return Ok(Exit::Unknown);
    };
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

struct Follower<'a> {
    client: &'a Client,
    id: MigrationId,
    out: Out,
    style: Style,
    cancelling: bool,
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
    async fn to_the_end(&mut self, patience: u32) -> Result<Option<Box<Report>>, Problem> {
        let started = Instant::now();
        let mut watch = self.client.watch(self.id).await.map_err(|error| error.problem())?;
        loop {
            let happened = match self.style.interrupts {
                Interrupts::EndTheCommand => Happened::Event(watch.next().await),
                Interrupts::CancelThenDetach => tokio::select! {
                    event = watch.next() => Happened::Event(event),
                    _ = tokio::signal::ctrl_c() => Happened::Interrupt,
                },
            };
            match happened {
                Happened::Event(Ok(Some(Event::Report(report)))) => return Ok(Some(report)),
                Happened::Event(Ok(Some(Event::Progress(progress)))) => {
                    let progress = self.monotone.admit(*progress);
                    self.show(&progress, started.elapsed());
                }
                Happened::Event(Err(error @ (ClientError::Answer { .. } | ClientError::Event { .. }))) => return Err(self.lost(&error)),
                Happened::Event(Ok(None)) => watch = self.again(None, patience).await?,
                Happened::Event(Err(error)) => watch = self.again(Some(error), patience).await?,
                Happened::Interrupt if self.cancelling => return Ok(None),
                Happened::Interrupt => self.cancel().await,
            }
        }
    }

    fn show(&mut self, progress: &Progress, since_start: Duration) {
        if self.style.events {
            self.out.object(progress);
        } else if let Some(line) = self.meter.line(progress, since_start) {
            let tone = if progress.stalled_because.is_some() { Tone::Doubtful } else { Tone::Good };
            let line = self.out.paint_talk(tone, &line);
            if self.out.live { self.out.live_line(&line) } else { self.out.talk(&line) }
        }
    }

    async fn cancel(&mut self) {
        self.cancelling = true;
        self.out.live_end();
        match self.client.cancel(self.id).await {
            Ok(_) => self.out.talk("cancelling; press Ctrl-C again to leave it alone"),
            Err(error) => {
                self.out.say_problem(&error.problem());
                self.out.talk("not cancelled; press Ctrl-C again to leave it alone");
            }
        }
    }

    /// Looks for a gateway that went away.
    async fn again(&self, mut lost: Option<ClientError>, patience: u32) -> Result<Watch, Problem> {
        self.out.live_end();
        self.out.talk("the gateway went away; looking for it");
        for _ in 0..patience {
            tokio::time::sleep(Duration::from_secs(1)).await;
            match self.client.watch(self.id).await {
                Ok(watch) => return Ok(watch),
                Err(ClientError::Refused(problem)) => return Err(*problem),
                Err(error) => lost = Some(error),
            }
        }
        let lost = lost.unwrap_or_else(|| ClientError::Silent { socket: self.client.socket().to_owned(), changes: true });
        Err(self.lost(&lost))
    }

    fn lost(&self, error: &ClientError) -> Problem {
        let message = format!("lost sight of migration `{}`: {}", self.id, crate::telemetry::chain(error));
        Problem::new(ErrorClass::InDoubt, message).with_code("gateway-lost").with_hint(format!(
            "start the gateway again; its journal knows who owns the VM, and `sealane status {}` then tells",
            render::short(self.id)
        ))
    }
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
        assert!(line.ends_with("stalled: the link is down"), "{line}");
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
        let style = Style { events: false, interrupts: Interrupts::EndTheCommand };
        let follower = Follower {
            client: &client,
            id,
            out: Out::new(false),
            style,
            cancelling: false,
            monotone: Monotone::new(),
            meter: Meter::new(false),
        };
        let problem = follower.again(None, 0).await.unwrap_err();
        assert_eq!(crate::control::exit_of(&problem), Exit::Unknown);
        assert!(problem.message.contains(&id.to_string()), "{}", problem.message);
    }
}
