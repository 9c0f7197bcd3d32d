//! What a policy looks like, before it is parsed: it is the same for people as for Cedar, and not too deep. Cedar's parser and validator
//! recurse over it, without a bound of their own.
//!
//! The estimate is never below the depth of the syntax tree (up to a constant), and close to it for what people write: a
//! chain of `&&` counts one per link, what stands between two links counts once, a list counts its deepest element.

use crate::limits;

/// Refuses what people would read otherwise than Cedar, or what is too deep, with the byte where it becomes so.
pub(super) fn check(text: &str) -> Result<(), (usize, String)> {
    if let Some((offset, hidden)) = text.char_indices().find(|(offset, c)| is_hidden(*c, text.get(offset + 1..).unwrap_or_default())) {
        let what = format!("a character that is not shown, `{}`, may have people read something else", hidden.escape_unicode());
        return Err((offset, what));
    }
    let mut scan = Scan { levels: vec![Level::default()] };
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let token = token(rest, first);
        let offset = text.len().saturating_sub(rest.len());
        rest = rest.get(token.len().max(first.len_utf8())..).unwrap_or_default();
        scan.take(token);
        if scan.levels.len() > limits::POLICY_NESTING_MAX {
            return Err((offset, format!("nested too deep, expected at most {} brackets inside each other", limits::POLICY_NESTING_MAX)));
        }
        if scan.levels.iter().fold(0_usize, |sum, level| sum.saturating_add(level.depth())) > limits::POLICY_DEPTH_MAX {
            let what = format!("one condition has too many parts, expected at most {}", limits::POLICY_DEPTH_MAX);
            return Err((offset, what + ": list values in a set, or split the policy"));
        }
    }
    Ok(())
}

/// Whether a character in front of `rest` has editors show something else than what stands there: control characters, also those of the
/// direction of writing, which Cedar lets stand in comments, spaces of no width, and ends of lines that only some know.
fn is_hidden(c: char, rest: &str) -> bool {
    match c {
        '\n' | '\t' => false,
        '\r' => !rest.starts_with('\n'),
        '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => true,
        _ => c.is_control(),
    }
}

/// The text between two brackets, since its last comma.
#[derive(Default, Clone, Copy)]
struct Level {
    /// `||`, `if`.
    or: usize,
    /// `&&` since the last `||`, and the most between two.
    and: usize,
    and_max: usize,
    /// Everything else since the last `&&` or `||`, and the most between two.
    part: usize,
    part_max: usize,
    /// The deepest before the last comma.
    element_max: usize,
}

impl Level {
    fn depth(&self) -> usize {
        let now = self.or.saturating_add(self.and.max(self.and_max)).saturating_add(self.part.max(self.part_max));
        now.max(self.element_max)
    }

    fn end_part(&mut self) {
        self.part_max = self.part_max.max(self.part);
        self.part = 0;
    }

    fn end_and(&mut self) {
        self.end_part();
        self.and_max = self.and_max.max(self.and);
        self.and = 0;
    }

    fn end_element(&mut self) {
        *self = Self { element_max: self.depth(), ..Self::default() };
    }
}

struct Scan {
    levels: Vec<Level>,
}

impl Scan {
    fn take(&mut self, token: &str) {
        let only = self.levels.len() == 1;
        if matches!(token, ")" | "]" | "}") && !only {
            let inner = self.levels.pop().map_or(0, |level| level.depth());
            if let Some(outer) = self.levels.last_mut() {
                outer.part = outer.part.saturating_add(inner).saturating_add(1);
            }
            return;
        }
        let Some(level) = self.levels.last_mut() else { return };
        match token {
            "(" | "[" | "{" => self.levels.push(Level::default()),
            ";" if only => *level = Level::default(),
            "," => level.end_element(),
            "||" | "if" => {
                level.end_and();
                level.or = level.or.saturating_add(1);
            }
            // Conditions of one policy are joined by `&&`.
            "&&" | "when" | "unless" => {
                level.end_part();
                level.and = level.and.saturating_add(1);
            }
            "then" | "else" => level.end_and(),
            "." | "==" | "!=" | "<" | "<=" | ">" | ">=" | "+" | "-" | "*" | "!" | "in" | "has" | "like" | "is" => {
                level.part = level.part.saturating_add(1);
            }
            _ => {}
        }
    }
}

/// The token at the start of `rest`; strings, comments and names whole.
fn token(rest: &str, first: char) -> &str {
    let bytes = rest.as_bytes();
    let length = match first {
        '"' => string_bytes(bytes),
        '/' if bytes.get(1) == Some(&b'/') => rest.find('\n').unwrap_or(rest.len()),
        c if is_word(c) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
        '&' | '|' | '=' | '!' | '<' | '>' => match bytes.get(1) {
            Some(b'=') => 2,
            Some(b'&' | b'|') if bytes.get(1) == bytes.first() => 2,
            _ => 1,
        },
        c => c.len_utf8(),
    };
    rest.get(..length).unwrap_or(rest)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn string_bytes(bytes: &[u8]) -> usize {
    let mut escaped = false;
    for (index, byte) in bytes.iter().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return index.saturating_add(1),
            _ => {}
        }
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn depth(text: &str) -> usize {
        let mut scan = Scan { levels: vec![Level::default()] };
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let token = token(rest, first);
            scan.take(token);
            rest = &rest[token.len()..];
        }
        scan.levels.iter().map(Level::depth).sum()
    }

    #[test]
    fn depth_follows_the_tree_and_not_the_length() {
        for (text, expect) in [
            ("a", 0),
            ("a.b.c", 2),
            ("a && b && c", 2),
            ("a.b == 1 && c.d == 2 && e.f == 3", 4),
            ("a.b == 1 || c.d == 2 && e.f == 3", 4),
            ("[1, 2, 3, 4, 5, 6]", 1),
            ("[a.b, c.d, e.f]", 2),
            ("((a))", 2),
            ("\"a && b || ((((\"", 0),
            ("\"\\\" && b\" // && && (((\n && c", 1),
            ("if a then b else if c then d else e", 2),
            ("1+1+1+1", 3),
            ("a.b.c(d.e)", 4),
            ("))) a.b", 1),
        ] {
            assert_eq!(depth(text), expect, "{text}");
        }
    }

    #[test]
    fn every_policy_starts_from_nothing() {
        let one = "permit (principal, action, resource) when { context.a && context.b };\n";
        assert!(depth(one) < 8);
        assert!(check(&one.repeat(1000)).is_ok());
    }

    #[test]
    fn unfinished_text_ends() {
        for text in ["\"abc", "// abc", "\"abc\\", "é\u{20ac}(", "&", "|", "/"] {
            assert!(check(text).is_ok(), "{text}");
        }
    }
}
