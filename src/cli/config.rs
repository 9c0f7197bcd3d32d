//! `config check`, and reading a configuration for other commands.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use super::Ending;
use super::flags::ConfigCheckFlags;
use super::output::{Out, Tone, printable};
use crate::config::{Config, ConfigError, ConfigProblem, Origin, Setting};
use crate::control::Exit;
use crate::telemetry::{ErrorClass, Problem, chain, schema_tag};

schema_tag!(
    /// Schema of `config check --json`.
    ConfigSchema = "sealane.config/1"
);

#[derive(Serialize)]
struct Object<'a> {
    schema: ConfigSchema,
    file: String,
    valid: bool,
    settings: &'a [Setting],
    problems: &'a [ConfigProblem],
}

pub(super) fn check(flags: &ConfigCheckFlags, out: Out) -> Ending {
    let checked = if flags.text_only { crate::config::load_text_only(&flags.file) } else { crate::config::load(&flags.file) };
    let file = flags.file.display().to_string();
    match checked {
        Ok(config) => {
            if out.json {
                out.object(&Object { schema: ConfigSchema, file, valid: true, settings: &config.settings, problems: &[] });
            } else {
                out.data(&effective(out, &file, &config.settings));
            }
            Ok(Exit::Done)
        }
        Err(error) if out.json && !error.problems().is_empty() => {
            out.object(&Object { schema: ConfigSchema, file, valid: false, settings: &[], problems: error.problems() });
            out.say_problem(&problem(&error));
            Ok(Exit::Usage)
        }
        Err(error) => Err(problem(&error)),
    }
}

/// Reads and checks a configuration; the problem lists everything that is wrong with it.
pub(super) fn load(file: &Path) -> Result<Config, Problem> {
    crate::config::load(file).map_err(|error| problem(&error))
}

/// The same without looking at the files that it names.
pub(super) fn load_text(file: &Path) -> Result<Config, Problem> {
    crate::config::load_text_only(file).map_err(|error| problem(&error))
}

fn problem(error: &ConfigError) -> Problem {
    let mut message = chain(error);
    if let ConfigError::Invalid { file, problems } = error {
        for problem in problems {
            let _ = write!(message, "\n{}:{problem}", file.display());
            if let Some(hint) = &problem.hint {
                let _ = write!(message, "\n    hint: {hint}");
            }
        }
    }
    let problem = Problem::new(ErrorClass::Misuse, message).with_code("configuration");
    if error.problems().is_empty() { problem.with_hint("config/gateway.toml in the source tree is a commented example") } else { problem }
}

fn effective(out: Out, file: &str, settings: &[Setting]) -> String {
    let width = settings.iter().map(|setting| setting.key.len() + 3 + setting.value.chars().count()).max().unwrap_or(0).min(72);
    let mut text = String::new();
    for setting in settings {
        let origin = match setting.origin {
            Origin::Line(line) => format!("# {file}:{line}"),
            Origin::Default => "# default".to_owned(),
        };
        let assignment = format!("{} = {}", setting.key, printable(&setting.value));
        let _ = writeln!(text, "{assignment:<width$}  {}", out.paint(Tone::Quiet, &origin));
    }
    text
}
