//! The pieces of a template: text, and the tokens of its actions.

use serde_json::Value;

/// Text between actions, or the tokens of one action.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Piece {
    Text(String),
    Action(Vec<Token>),
}

/// A token of an action.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Token {
    /// A keyword or a function.
    Word(String),
    /// `.A.B`; empty for the dot alone.
    Field(Vec<String>),
    /// `$name.A.B`.
    Variable(String, Vec<String>),
    /// A string, number, bool or `nil`.
    Literal(Value),
    Pipe,
    Open,
    /// `)`, and the fields that are taken of what it closes.
    Close(Vec<String>),
    Assign,
    Comma,
}

/// Cuts a template into pieces.
pub(crate) fn pieces(template: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = template;
    let mut trim_start = false;
    while !rest.is_empty() {
        let (text, after) = match rest.split_once("{{") {
            Some((text, after)) => (text, Some(after)),
            None => (rest, None),
        };
        let mut text = if trim_start { text.trim_start() } else { text };
        let Some(after) = after else {
            pieces.push(Piece::Text(text.to_owned()));
            break;
        };
        let inner = match after.strip_prefix("- ") {
            Some(inner) => {
                text = text.trim_end();
                inner
            }
            None => after,
        };
        if !text.is_empty() {
            pieces.push(Piece::Text(text.to_owned()));
        }
        let end = action_end(inner).ok_or("an action is not closed: }} is missing")?;
        let action = &inner[..end];
        rest = &inner[end + 2..];
        trim_start = action.ends_with(" -");
        let action = action.strip_suffix(" -").unwrap_or(action).trim();
        if !(action.starts_with("/*") && action.ends_with("*/")) {
            pieces.push(Piece::Action(tokens(action)?));
        }
    }
    Ok(pieces)
}

/// Where the action ends: at the first braces outside of a string.
fn action_end(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut quote = None;
    let mut index = 0;
    while index < bytes.len() {
        match (quote, bytes[index]) {
            (Some(b'"'), b'\\') => index += 1,
            (Some(open), byte) if byte == open => quote = None,
            (None, byte @ (b'"' | b'`')) => quote = Some(byte),
            (None, b'}') if bytes.get(index + 1) == Some(&b'}') => return Some(index),
            _ => {}
        }
        index += 1;
    }
    None
}

fn tokens(action: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = action;
    while let Some(first) = rest.chars().next() {
        let token;
        (token, rest) = match first {
            blank if blank.is_whitespace() => {
                rest = rest.trim_start();
                continue;
            }
            '|' => (Token::Pipe, &rest[1..]),
            ',' => (Token::Comma, &rest[1..]),
            '(' => (Token::Open, &rest[1..]),
            ')' => {
                let (fields, rest) = fields(&rest[1..]);
                (Token::Close(fields), rest)
            }
            ':' if rest.starts_with(":=") => (Token::Assign, &rest[2..]),
            '=' => (Token::Assign, &rest[1..]),
            '"' => quoted(rest)?,
            '`' => {
                let (text, rest) = rest[1..].split_once('`').ok_or("a string is not closed")?;
                (Token::Literal(text.into()), rest)
            }
            '.' if !rest[1..].starts_with(name_letter) => (Token::Field(Vec::new()), &rest[1..]),
            '.' => {
                let (fields, rest) = fields(rest);
                (Token::Field(fields), rest)
            }
            '$' => {
                let (name, after) = word(&rest[1..]);
                let (fields, after) = fields(after);
                (Token::Variable(name.to_owned(), fields), after)
            }
            '-' | '0'..='9' => number(rest)?,
            letter if name_letter(letter) => {
                let (name, rest) = word(rest);
                let token = match name {
                    "true" => Token::Literal(true.into()),
                    "false" => Token::Literal(false.into()),
                    "nil" => Token::Literal(Value::Null),
                    _ => Token::Word(name.to_owned()),
                };
                (token, rest)
            }
            other => return Err(format!("unexpected {other:?} in {{{{{action}}}}}")),
        };
        tokens.push(token);
    }
    Ok(tokens)
}

fn name_letter(letter: char) -> bool {
    letter.is_alphanumeric() || letter == '_'
}

fn word(text: &str) -> (&str, &str) {
    text.split_at(text.find(|letter| !name_letter(letter)).unwrap_or(text.len()))
}

/// `.A.B` at the start of `text`.
fn fields(mut text: &str) -> (Vec<String>, &str) {
    let mut fields = Vec::new();
    while let Some(rest) = text.strip_prefix('.').filter(|rest| rest.starts_with(name_letter)) {
        let (name, rest) = word(rest);
        fields.push(name.to_owned());
        text = rest;
    }
    (fields, text)
}

fn quoted(text: &str) -> Result<(Token, &str), String> {
    let mut value = String::new();
    let mut letters = text.char_indices().skip(1);
    while let Some((index, letter)) = letters.next() {
        match letter {
            '"' => return Ok((Token::Literal(value.into()), &text[index + 1..])),
            '\\' => match letters.next().map(|(_, letter)| letter) {
                Some('n') => value.push('\n'),
                Some('t') => value.push('\t'),
                Some(other @ ('"' | '\\' | '\'')) => value.push(other),
                other => return Err(format!("a string has the unknown escape {other:?}")),
            },
            other => value.push(other),
        }
    }
    Err("a string is not closed".to_owned())
}

fn number(text: &str) -> Result<(Token, &str), String> {
    let end = text[1..]
        .find(|letter: char| !letter.is_ascii_digit() && letter != '.')
        .map_or(text.len(), |end| end + 1);
    let value: Value =
        serde_json::from_str(&text[..end]).map_err(|_| format!("{:?} is no number", &text[..end]))?;
    Ok((Token::Literal(value), &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_end_outside_of_strings_and_trim_what_they_are_told_to() {
        let cut = pieces("a {{- \"}}\" -}} b{{/* c */}}").unwrap();
        let action = Piece::Action(vec![Token::Literal("}}".into())]);
        assert_eq!(cut, [Piece::Text("a".into()), action, Piece::Text("b".into())]);
    }

    #[test]
    fn what_is_no_template_is_refused() {
        for bad in ["{{", "{{.A", "{{\"x}}", "{{?}}", "{{\"\\q\"}}", "{{1.2.3}}"] {
            assert!(pieces(bad).is_err(), "{bad}");
        }
    }
}
