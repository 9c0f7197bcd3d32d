//! The file as typed: tables and values with their places, and the list of problems that grows.
//!
//! WHY not derived deserialisers: they stop at the first bad value, and a person wants all of them.

use std::path::{Path, PathBuf};

use serde::Serialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{ConfigError, ConfigProblem};
use crate::limits::CONFIG_PROBLEMS_MAX;

/// One effective value, for `config check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// Path of the key, e.g. `peer[1].address`.
    pub key: String,
    /// The value as it takes effect: units normalised, paths made absolute.
    pub value: String,
    /// Where it comes from.
    pub origin: Origin,
}

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A line of the file.
    Line(usize),
    /// Not in the file.
    Default,
}

/// A value and where it is.
#[derive(Debug, Clone)]
pub(super) struct Located<T> {
    pub(super) value: T,
    pub(super) at: usize,
}

/// A kind of value that can stand in the file.
pub(super) trait Typed: Sized {
    /// For messages: `expected …`.
    const EXPECTED: &'static str;
    /// Reads it, or says why not: a hint, if there is one.
    fn read(reader: &mut Reader, key: &str, value: &Spanned<DeValue<'_>>) -> Result<Self, Option<String>>;
    /// As `config check` shows it.
    fn show(&self) -> String;
}

/// A file that some key names, to be looked at later.
#[derive(Debug)]
pub(super) struct FileMention {
    pub(super) key: String,
    pub(super) at: usize,
    pub(super) path: PathBuf,
    pub(super) kind: FileKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FileKind {
    Certificate,
    PrivateKey,
    Pem(&'static str),
    RevocationList,
    PolicyDirectory,
    PolicyBundle,
    Pin,
    Library,
}

/// Collects problems, settings and mentioned files while the tables are read.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) file: PathBuf,
    pub(super) base: PathBuf,
    line_starts: Vec<(usize, String)>,
    problems: Vec<ConfigProblem>,
    pub(super) settings: Vec<Setting>,
    pub(super) mentions: Vec<FileMention>,
    /// Lines that are not TOML; what is missing after one is not worth a second message.
    broken: bool,
}

/// A table of the file that is being read.
#[derive(Debug)]
pub(super) struct Section<'d, 't> {
    pub(super) path: String,
    at: usize,
    table: Option<&'d DeTable<'t>>,
    asked: Vec<&'static str>,
}

impl Section<'_, '_> {
    /// Path of a key of this table.
    pub(super) fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// Whether the table is in the file.
    pub(super) fn is_present(&self) -> bool {
        self.table.is_some()
    }

    /// Where the table is.
    pub(super) fn at(&self) -> usize {
        self.at
    }
}

impl Reader {
    pub(super) fn new(text: &str, file: &Path) -> Self {
        let mut line_starts = Vec::new();
        let mut start = 0;
        for line in text.split_inclusive('\n') {
            line_starts.push((start, line.to_owned()));
            start += line.len();
        }
        let base = std::path::absolute(file).ok().and_then(|file| file.parent().map(Path::to_owned)).unwrap_or_default();
        Self { file: file.to_owned(), base, line_starts, problems: Vec::new(), settings: Vec::new(), mentions: Vec::new(), broken: false }
    }

    /// The whole file as a table; syntax errors become problems.
    pub(super) fn root<'t>(&mut self, text: &'t str) -> DeTable<'t> {
        let (table, errors) = DeTable::parse_recoverable(text);
        self.broken = !errors.is_empty();
        for error in errors {
            let at = error.span().map_or(0, |span| span.start);
            self.problem(at, "", format!("not TOML: {}", error.message().replace('\n', " ")), None);
        }
        table.into_inner()
    }

    pub(super) fn top<'d, 't>(table: &'d DeTable<'t>) -> Section<'d, 't> {
        Section { path: String::new(), at: 0, table: Some(table), asked: Vec::new() }
    }

    /// The table `[key]`, or an empty one in its place.
    pub(super) fn section<'d, 't>(&mut self, parent: &mut Section<'d, 't>, key: &'static str) -> Section<'d, 't> {
        let path = parent.key(key);
        parent.asked.push(key);
        let found = parent.table.and_then(|table| table.get(key));
        let table = found.and_then(|value| value.get_ref().as_table());
        let at = found.map_or(parent.at, |value| value.span().start);
        if let (Some(value), None) = (found, table) {
            self.wrong(value, &path, &format!("a table `[{path}]`"), None);
        }
        Section { path, at, table, asked: Vec::new() }
    }

    /// Every table `[[key]]`.
    pub(super) fn sections<'d, 't>(&mut self, parent: &mut Section<'d, 't>, key: &'static str) -> Vec<Section<'d, 't>> {
        let path = parent.key(key);
        parent.asked.push(key);
        let Some(found) = parent.table.and_then(|table| table.get(key)) else { return Vec::new() };
        let Some(array) = found.get_ref().as_array() else {
            self.wrong(found, &path, &format!("tables `[[{path}]]`"), Some(format!("write `[[{path}]]` with two brackets on each side")));
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (index, value) in array.iter().enumerate() {
            let path = format!("{path}[{index}]");
            match value.get_ref().as_table() {
                Some(table) => sections.push(Section { path, at: value.span().start, table: Some(table), asked: Vec::new() }),
                None => self.wrong(value, &path, "a table", None),
            }
        }
        sections
    }

    /// A value that may be absent.
    pub(super) fn optional<T: Typed>(&mut self, section: &mut Section<'_, '_>, key: &'static str) -> Option<Located<T>> {
        section.asked.push(key);
        let value = section.table?.get(key)?;
        let path = section.key(key);
        let at = value.span().start;
        let before = self.problems.len();
        match T::read(self, &path, value) {
            Ok(read) => {
                self.settings.push(Setting { key: path, value: read.show(), origin: Origin::Line(self.place(at).0) });
                Some(Located { value: read, at })
            }
            Err(hint) => {
                // A list has said which of its values is wrong.
                if self.problems.len() == before {
                    self.wrong(value, &path, T::EXPECTED, hint);
                }
                None
            }
        }
    }

    /// A value that must be there.
    pub(super) fn required<T: Typed>(&mut self, section: &mut Section<'_, '_>, key: &'static str) -> Option<Located<T>> {
        if section.table.is_none_or(|table| !table.contains_key(key)) {
            section.asked.push(key);
            if !self.broken {
                let path = section.key(key);
                self.problem(section.at, &path, format!("missing: expected {}", T::EXPECTED), None);
            }
            return None;
        }
        self.optional(section, key)
    }

    /// A value with a default, which also stands in for a wrong one.
    pub(super) fn or<T: Typed>(&mut self, section: &mut Section<'_, '_>, key: &'static str, default: T) -> Located<T> {
        let present = section.table.is_some_and(|table| table.contains_key(key));
        if let Some(found) = self.optional(section, key) {
            return found;
        }
        if !present {
            self.settings.push(Setting { key: section.key(key), value: default.show(), origin: Origin::Default });
        }
        Located { value: default, at: section.at }
    }

    /// Every key that nobody asked for is a problem.
    pub(super) fn finish(&mut self, section: Section<'_, '_>) {
        let Section { path, table, asked, .. } = section;
        for key in table.iter().flat_map(|table| table.keys()) {
            let name: &str = key.get_ref();
            if asked.contains(&name) {
                continue;
            }
            let shown: String = name.chars().take(60).flat_map(char::escape_default).collect();
            let full = if path.is_empty() { shown } else { format!("{path}.{shown}") };
            let hint = match nearest(name, &asked) {
                Some(known) => format!("did you mean `{known}`?"),
                None => format!("known keys here: {}", asked.join(", ")),
            };
            self.problem(key.span().start, &full, "unknown key".to_owned(), Some(hint));
        }
    }

    /// Adds a problem at a byte offset.
    pub(super) fn problem(&mut self, at: usize, key: &str, message: String, hint: Option<String>) {
        if self.problems.len() < CONFIG_PROBLEMS_MAX {
            let (line, column) = self.place(at);
            self.problems.push(ConfigProblem { line, column, key: key.to_owned(), message, hint });
        }
    }

    pub(super) fn wrong(&mut self, value: &Spanned<DeValue<'_>>, key: &str, expected: &str, hint: Option<String>) {
        self.problem(value.span().start, key, format!("expected {expected}, got {}", describe(value.get_ref())), hint);
    }

    /// Line and column, from 1.
    pub(super) fn place(&self, at: usize) -> (usize, usize) {
        let index = self.line_starts.partition_point(|(start, _)| *start <= at).saturating_sub(1);
        let Some((start, line)) = self.line_starts.get(index) else { return (1, 1) };
        let column = line.char_indices().take_while(|(offset, _)| start + offset < at).count();
        (index + 1, column + 1)
    }

    /// All problems, by place; none is success.
    pub(super) fn outcome(&mut self) -> Result<(), ConfigError> {
        if self.problems.is_empty() {
            return Ok(());
        }
        let mut problems = std::mem::take(&mut self.problems);
        problems.sort_by_key(|problem| (problem.line, problem.column));
        Err(ConfigError::Invalid { file: self.file.clone(), problems })
    }
}

/// A value in a message: bounded, printable.
fn describe(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) if text.is_empty() => "an empty text".to_owned(),
        DeValue::String(text) => format!("`{}`", text.chars().take(80).flat_map(char::escape_debug).collect::<String>()),
        DeValue::Integer(number) => format!("the number {}", number.as_str().chars().take(40).collect::<String>()),
        DeValue::Float(number) => format!("the number {}", number.as_str().chars().take(40).collect::<String>()),
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Datetime(_) => "a date".to_owned(),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

/// The known key that differs from `name` by at most two letters.
fn nearest(name: &str, known: &[&'static str]) -> Option<&'static str> {
    let close = known.iter().map(|key| (distance(name, key), *key)).filter(|(distance, key)| *distance <= 2 && *distance < key.len());
    close.min_by_key(|(distance, _)| *distance).map(|(_, key)| key)
}

/// Levenshtein distance; names longer than any key are simply far.
fn distance(left: &str, right: &str) -> usize {
    if left.len() > 40 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=right.chars().count()).collect();
    for (i, a) in left.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in right.chars().enumerate() {
            let substitute = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or(usize::MAX)
}
