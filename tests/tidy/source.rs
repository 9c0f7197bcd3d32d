//! A Rust file taken apart just far enough for the rules: code, comments, tokens and paths.

/// One text file of the repository, with views of the same length and the same line breaks.
pub struct File {
    /// Path from the repository's root, with `/`.
    pub path: String,
    /// The file as it is.
    pub text: String,
    /// Only code: comments and the insides of strings are blank. Empty unless the file is Rust.
    pub code: String,
    /// `code` without the items under `#[cfg(test)]`; blank where the whole file is a test module.
    pub production: String,
    /// Only comments.
    pub comments: String,
}

impl File {
    pub fn new(path: &str, text: &str) -> Self {
        let (code, comments) = if path.ends_with(".rs") { separate(text) } else { (String::new(), String::new()) };
        let production = without_tests(&code);
        Self { path: path.to_owned(), text: text.to_owned(), code, production, comments }
    }

    /// The folder or file under `src/` that the file belongs to: `wire`, `main`.
    pub fn module(&self) -> Option<&str> {
        let rest = self.path.strip_prefix("src/")?.strip_suffix(".rs")?;
        Some(rest.split('/').next().unwrap_or(rest))
    }

    /// The `//!` lines at the head of the file, as text.
    pub fn module_doc(&self) -> String {
        let lines = self.text.lines().take_while(|line| line.starts_with("//!") || line.is_empty());
        lines.map(|line| line.trim_start_matches("//!").trim()).collect::<Vec<_>>().join(" ")
    }

    /// Files that exist only under `#[cfg(test)]` because this one says `#[cfg(test)] mod name;`.
    pub fn test_modules(&self) -> Vec<String> {
        let Some(stem) = self.path.strip_suffix(".rs") else { return Vec::new() };
        let folder = match stem.rsplit_once('/') {
            Some((folder, "mod" | "lib" | "main")) => folder,
            _ => stem,
        };
        let tokens = tokens(&self.code);
        let head = ["#", "[", "cfg", "(", "test", ")", "]"];
        let mut found = Vec::new();
        for start in 0..tokens.len() {
            let mut rest = tokens[start..].iter().map(|token| token.text);
            if head.iter().all(|want| rest.next() == Some(want))
                && let (Some("mod"), Some(name), Some(";")) = (rest.next(), rest.next(), rest.next())
            {
                found.push(format!("{folder}/{name}"));
            }
        }
        found
    }

    /// Whether `other` (without `.rs`) is this file or the folder that holds it.
    pub fn belongs_to(&self, other: &str) -> bool {
        self.path.strip_prefix(other).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
    }
}

/// Splits Rust text into (code, comments), both as long as the text.
fn separate(text: &str) -> (String, String) {
    let bytes = text.as_bytes();
    let blank: Vec<u8> = bytes.iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }).collect();
    let (mut code, mut comments) = (blank.clone(), blank);
    let mut at = 0;
    while at < bytes.len() {
        if let Some(end) = comment_end(bytes, at) {
            comments[at..end].copy_from_slice(&bytes[at..end]);
            at = end;
        } else if let Some(end) = literal_end(bytes, at) {
            code[at] = b'"';
            code[end - 1] = b'"';
            at = end;
        } else {
            code[at] = bytes[at];
            at += 1;
        }
    }
    (String::from_utf8_lossy(&code).into_owned(), String::from_utf8_lossy(&comments).into_owned())
}

fn find(bytes: &[u8], from: usize, needle: &[u8]) -> Option<usize> {
    bytes[from.min(bytes.len())..].windows(needle.len()).position(|window| window == needle).map(|offset| from + offset)
}

fn comment_end(bytes: &[u8], at: usize) -> Option<usize> {
    if bytes[at..].starts_with(b"//") {
        return Some(find(bytes, at, b"\n").unwrap_or(bytes.len()));
    }
    if !bytes[at..].starts_with(b"/*") {
        return None;
    }
    let (mut depth, mut i) = (1, at + 2);
    while depth > 0 && i < bytes.len() {
        let step = match &bytes[i..] {
            [b'/', b'*', ..] => (1, 2),
            [b'*', b'/', ..] => (-1, 2),
            _ => (0, 1),
        };
        depth += step.0;
        i += step.1;
    }
    Some(i.min(bytes.len()))
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// The end of the string or character literal that starts at `at`, if one does.
fn literal_end(bytes: &[u8], at: usize) -> Option<usize> {
    let escaped = |quote: u8, mut i: usize| {
        while i < bytes.len() && bytes[i] != quote {
            i += if bytes[i] == b'\\' { 2 } else { 1 };
        }
        (i + 1).min(bytes.len())
    };
    if at > 0 && is_word(bytes[at - 1]) && bytes[at] != b'"' && bytes[at] != b'\'' {
        return None;
    }
    let mut open = at;
    while open < at + 2 && matches!(bytes.get(open), Some(b'b' | b'c' | b'r')) {
        open += 1;
    }
    let raw = bytes[at..open].contains(&b'r');
    let hashes = bytes[open..].iter().take_while(|b| **b == b'#').count();
    match bytes.get(open + hashes)? {
        b'"' if raw => {
            let close = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
            Some(find(bytes, open + hashes + 1, &close).map_or(bytes.len(), |found| found + close.len()))
        }
        b'"' if hashes == 0 => Some(escaped(b'"', open + 1)),
        b'\'' if hashes == 0 && !raw => {
            let next = *bytes.get(open + 1)?;
            let width = std::str::from_utf8(&bytes[open + 1..]).ok()?.chars().next()?.len_utf8();
            let literal = next == b'\\' || bytes.get(open + 1 + width) == Some(&b'\'');
            literal.then(|| escaped(b'\'', open + 1))
        }
        _ => None,
    }
}

/// Blanks every item that stands under an attribute `#[cfg(test)]` or `#[cfg(all(test, …))]`.
fn without_tests(code: &str) -> String {
    let mut out = code.as_bytes().to_vec();
    for marker in ["#[cfg(test)]", "#[cfg(all(test"] {
        let mut from = 0;
        while let Some(start) = find(code.as_bytes(), from, marker.as_bytes()) {
            let end = item_end(code.as_bytes(), start);
            for byte in &mut out[start..end] {
                if *byte != b'\n' {
                    *byte = b' ';
                }
            }
            from = end.max(start + 1);
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// The end of the item that starts with an attribute at `start`.
fn item_end(code: &[u8], start: usize) -> usize {
    let (mut depth, mut i) = (0_i32, start);
    while i < code.len() {
        match code[i] {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' => depth -= 1,
            b'}' => {
                depth -= 1;
                let rest = code[i + 1..].iter().position(|b| !b.is_ascii_whitespace()).map(|n| i + 1 + n);
                if depth <= 0 && !matches!(rest.map(|n| code[n]), Some(b';' | b',')) {
                    return i + 1;
                }
            }
            b';' if depth == 0 => return i + 1,
            _ => {}
        }
        i += 1;
    }
    code.len()
}

/// A word, `::`, or one other character.
#[derive(Clone, Copy)]
pub struct Token<'a> {
    pub text: &'a str,
    pub line: usize,
}

pub fn is_ident(text: &str) -> bool {
    text.bytes().next().is_some_and(|b| is_word(b) && !b.is_ascii_digit())
}

pub fn tokens(code: &str) -> Vec<Token<'_>> {
    let bytes = code.as_bytes();
    let (mut found, mut at, mut line) = (Vec::new(), 0, 1);
    while at < bytes.len() {
        let mut end = at + 1;
        if is_word(bytes[at]) {
            end += bytes[end..].iter().take_while(|b| is_word(**b)).count();
        } else if bytes[at..].starts_with(b"::") {
            end += 1;
        } else if bytes[at] == b'\n' {
            line += 1;
        }
        if !bytes[at].is_ascii_whitespace()
            && let Some(text) = code.get(at..end)
        {
            found.push(Token { text, line });
        }
        at = end;
    }
    found
}

/// A path of at least two segments, with `use` groups written out.
pub struct Path {
    pub segments: Vec<String>,
    pub line: usize,
}

/// Every path in `code`; `use a::{b, c::d};` gives `a::b` and `a::c::d`.
pub fn paths(code: &str) -> Vec<Path> {
    let tokens = tokens(code);
    let (mut found, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        at = if is_ident(tokens[at].text) { path_tree(&tokens, at, &[], &mut found) } else { at + 1 };
    }
    found.retain(|path| path.segments.len() > 1);
    found
}

fn path_tree(tokens: &[Token<'_>], at: usize, prefix: &[String], found: &mut Vec<Path>) -> usize {
    let Some(token) = tokens.get(at) else { return at };
    if token.text == "{" {
        let mut next = at + 1;
        while tokens.get(next).is_some_and(|t| t.text != "}") {
            next = path_tree(tokens, next, prefix, found).max(next + 1);
        }
        return next + 1;
    }
    let mut segments = prefix.to_vec();
    if !is_ident(token.text) && token.text != "*" {
        return at + 1;
    }
    segments.push(token.text.to_owned());
    let continues = tokens.get(at + 1).is_some_and(|t| t.text == "::")
        && tokens.get(at + 2).is_some_and(|t| is_ident(t.text) || t.text == "{" || t.text == "*");
    if continues {
        return path_tree(tokens, at + 2, &segments, found);
    }
    found.push(Path { segments, line: token.line });
    let renamed = !prefix.is_empty() && tokens.get(at + 1).is_some_and(|t| t.text == "as");
    at + if renamed { 3 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(code: &str) -> Vec<String> {
        paths(code).iter().map(|path| path.segments.join("::")).collect()
    }

    #[test]
    fn comments_strings_and_characters_are_not_code() {
        let text = "a /* b /* c */ */ \"d // e\" r#\"f \" g\"# b'h' '\\'' 'i' // j\nlet k: &'l str = b\"\\\"m\";";
        let file = File::new("src/x.rs", text);
        let words: Vec<_> = tokens(&file.code).iter().map(|t| t.text).filter(|t| is_ident(t)).collect();
        assert_eq!(words, ["a", "let", "k", "l", "str"]);
        assert!(file.comments.contains("// j") && !file.comments.contains("// e"));
        assert_eq!(file.code.len(), text.len());
    }

    #[test]
    fn a_character_that_looks_like_a_string_does_not_swallow_the_file() {
        let file = File::new("src/x.rs", "let quote = '\"'; unsafe {} let life: &'static str = \"x\"; é");
        assert!(file.code.contains("unsafe") && file.code.contains("static"));
    }

    #[test]
    fn groups_are_written_out() {
        assert_eq!(
            joined("use crate::{wire::{Frame as F, self}, memory::*}; y"),
            ["crate::wire::Frame", "crate::wire::self", "crate::memory::*"]
        );
        assert_eq!(joined("let x = crate :: wire\n::Frame::<u8>::new(std::fs::File);"), ["crate::wire::Frame", "std::fs::File"]);
    }

    #[test]
    fn test_items_are_not_production() {
        let text = "fn a() {}\n#[cfg(test)]\nuse x::{y, z};\n#[cfg(test)]\nmod tests {\n    fn b() { [0; 3]; }\n}\nfn c() {}";
        let file = File::new("src/x.rs", text);
        let words: Vec<_> = tokens(&file.production).iter().map(|t| t.text).filter(|t| is_ident(t)).collect();
        assert_eq!(words, ["fn", "a", "fn", "c"]);
    }

    #[test]
    fn test_modules_in_their_own_file_are_found() {
        let names = |path| File::new(path, "#[cfg(test)]\nmod tests;\nmod real;").test_modules();
        assert_eq!(names("src/wire/mod.rs"), ["src/wire/tests"]);
        assert_eq!(names("src/wire/frame.rs"), ["src/wire/frame/tests"]);
        assert!(File::new("src/wire/tests/a.rs", "").belongs_to("src/wire/tests"));
        assert!(!File::new("src/wire/tests_of.rs", "").belongs_to("src/wire/tests"));
    }
}
