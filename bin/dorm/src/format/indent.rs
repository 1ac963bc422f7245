//! JSON text with other white space, and not a byte of its values changed: order, numbers and escapes stay as they are.

/// Spreads compact JSON over lines, `step` for each level.
pub(crate) fn indent(json: &str, step: &str) -> String {
    let mut out = String::with_capacity(json.len() * 2);
    let mut depth: usize = 0;
    let mut text = json.chars().peekable();
    let newline = |out: &mut String, depth: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n(step, depth));
    };
    while let Some(letter) = text.next() {
        match letter {
            '"' => {
                out.push('"');
                copy_string(&mut text, &mut out);
            }
            '{' | '[' => {
                out.push(letter);
                while text.next_if(char::is_ascii_whitespace).is_some() {}
                if let Some(end) = text.next_if(|next| matches!(next, '}' | ']')) {
                    out.push(end);
                } else {
                    depth += 1;
                    newline(&mut out, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                newline(&mut out, depth);
                out.push(letter);
            }
            ',' => {
                out.push(',');
                newline(&mut out, depth);
            }
            ':' => out.push_str(": "),
            blank if blank.is_ascii_whitespace() => {}
            other => out.push(other),
        }
    }
    out
}

/// The rest of a string, its quote included.
fn copy_string(text: &mut impl Iterator<Item = char>, out: &mut String) {
    while let Some(letter) = text.next() {
        out.push(letter);
        match letter {
            '"' => return,
            '\\' => out.extend(text.next()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_white_space_changes() {
        let json = r#"{"b":[1.50,{"\"x{":"a:b,c"}],"a":{},"n":[ ]}"#;
        let wanted = "{\n  \"b\": [\n    1.50,\n    {\n      \"\\\"x{\": \"a:b,c\"\n    }\n  ],\n  \"a\": {},\n  \"n\": []\n}";
        assert_eq!(indent(json, "  "), wanted);
        assert_eq!(indent(wanted, "  "), wanted);
    }
}
