//! Where words go: data to stdout, talk to stderr.

use std::io::{IsTerminal, Write};

use serde::Serialize;

use crate::telemetry::{Problem, RunningOn, schema_tag};

schema_tag!(
    /// Schema of a failure as an object of its own.
    ProblemSchema = "sealane.problem/1"
);

/// Where words go, and how they look.
#[derive(Debug, Clone, Copy)]
pub(super) struct Out {
    /// Whether stdout gets JSON.
    pub(super) json: bool,
    /// Whether stderr shows a moving line.
    pub(super) live: bool,
    colour: bool,
    colour_talk: bool,
}

/// Colours mean the same everywhere.
#[derive(Debug, Clone, Copy)]
pub(super) enum Tone {
    Good,
    Doubtful,
    Bad,
    Quiet,
}

impl Out {
    pub(super) fn new(json: bool) -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let live = std::io::stderr().is_terminal() && !dumb;
        Self { json, live, colour: wanted && !dumb && std::io::stdout().is_terminal(), colour_talk: wanted && live }
    }

    /// Writes to stdout. A reader that has gone away is not an error: nobody is left to tell.
    pub(super) fn data(self, text: &str) {
        let mut stdout = std::io::stdout().lock();
        let _ = stdout.write_all(text.as_bytes());
        if !text.ends_with('\n') {
            let _ = stdout.write_all(b"\n");
        }
        let _ = stdout.flush();
    }

    /// Writes one object, on one line, to stdout.
    pub(super) fn object(self, object: &impl Serialize) {
        if let Ok(text) = serde_json::to_string(object) {
            self.data(&text);
        }
    }

    /// Writes a line to stderr.
    pub(super) fn talk(self, text: &str) {
        let mut stderr = std::io::stderr().lock();
        let _ = writeln!(stderr, "{text}");
    }

    /// Replaces the moving line of stderr; wrapping is off, because only one line can be replaced.
    pub(super) fn live_line(self, text: &str) {
        let mut stderr = std::io::stderr().lock();
        let _ = write!(stderr, "\r\x1b[?7l{text}\x1b[K\x1b[?7h");
        let _ = stderr.flush();
    }

    /// Ends the moving line.
    pub(super) fn live_end(self) {
        if self.live {
            let _ = write!(std::io::stderr().lock(), "\r\x1b[K");
        }
    }

    pub(super) fn paint(self, tone: Tone, text: &str) -> String {
        paint(self.colour, tone, text)
    }

    pub(super) fn paint_talk(self, tone: Tone, text: &str) -> String {
        paint(self.colour_talk, tone, text)
    }

    /// Says a failure: in words on stderr, with --json also as an object on stdout.
    pub(super) fn problem(self, problem: &Problem) {
        #[derive(Serialize)]
        struct Object<'a> {
            schema: ProblemSchema,
            #[serde(flatten)]
            problem: &'a Problem,
        }
        if self.json {
            self.object(&Object { schema: ProblemSchema, problem });
        }
        self.say_problem(problem);
    }

    /// Says a failure in words on stderr.
    pub(super) fn say_problem(self, problem: &Problem) {
        self.talk(&format!("{} {}", self.paint_talk(Tone::Bad, "error:"), printable(&problem.message)));
        if let Some(place) = problem.running_on {
            self.talk(whereabouts(place));
        }
        if let Some(hint) = &problem.hint {
            self.talk(&format!("\n{} {}", self.paint_talk(Tone::Doubtful, "hint:"), printable(hint)));
        }
    }
}

/// Where the VM runs, as a sentence.
pub(super) fn whereabouts(place: RunningOn) -> &'static str {
    match place {
        RunningOn::Source => "the VM runs on the source",
        RunningOn::Destination => "the VM runs on the destination",
        RunningOn::NeitherYet => "the VM runs on neither side until the outcome is known",
    }
}

/// Text from a gateway or a peer without anything that moves a terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

fn paint(on: bool, tone: Tone, text: &str) -> String {
    let code = match tone {
        Tone::Good => "32",
        Tone::Doubtful => "33",
        Tone::Bad => "31",
        Tone::Quiet => "2",
    };
    if on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
}
