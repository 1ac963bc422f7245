//! The functions of templates: Go's own, and those that docker adds.

use std::cmp::Ordering;

use serde_json::Value;

use super::evaluate::{show, truth};

/// Longest text that padding may ask for.
const PADDING_MAX: u64 = 4096;

/// Calls a function.
pub(super) fn call(name: &str, arguments: Vec<Value>) -> Result<Value, String> {
    let text = |value: &Value| {
        let mut text = String::new();
        show(value, &mut text);
        text
    };
    match (name, arguments.as_slice()) {
        ("json", [value]) => Ok(value.to_string().into()),
        ("lower", [value]) => Ok(text(value).to_lowercase().into()),
        ("upper", [value]) => Ok(text(value).to_uppercase().into()),
        ("title", [value]) => Ok(titled(&text(value)).into()),
        ("split", [whole, by]) => {
            let (whole, by) = (text(whole), text(by));
            Ok(whole.split(by.as_str()).map(Value::from).collect::<Vec<_>>().into())
        }
        ("join", [Value::Array(items), by]) => {
            Ok(items.iter().map(text).collect::<Vec<_>>().join(&text(by)).into())
        }
        ("join", [Value::Null, _]) => Ok("".into()),
        ("truncate", [value, length]) => {
            let length =
                usize::try_from(length.as_u64().ok_or("truncate needs a length")?).unwrap_or(usize::MAX);
            Ok(text(value).chars().take(length).collect::<String>().into())
        }
        ("pad", [value, before, after]) => {
            let blanks = |count: &Value| -> Result<String, String> {
                let count =
                    count.as_u64().filter(|count| *count <= PADDING_MAX).ok_or("pad needs two lengths")?;
                Ok(" ".repeat(usize::try_from(count).unwrap_or(0)))
            };
            Ok(format!("{}{}{}", blanks(before)?, text(value), blanks(after)?).into())
        }
        ("print", values) => Ok(values.iter().map(text).collect::<String>().into()),
        ("println", values) => Ok((values.iter().map(text).collect::<Vec<_>>().join(" ") + "\n").into()),
        ("printf", [Value::String(format), values @ ..]) => formatted(format, values).map(Value::from),
        ("len", [value]) => match value {
            Value::String(text) => Ok(text.len().into()),
            Value::Array(items) => Ok(items.len().into()),
            Value::Object(map) => Ok(map.len().into()),
            _ => Err(format!("{value} has no length")),
        },
        ("index", [value, keys @ ..]) => index(value, keys),
        ("eq", [value, others @ ..]) if !others.is_empty() => {
            Ok(others.iter().any(|other| order(value, other) == Some(Ordering::Equal)).into())
        }
        ("ne", [one, other]) => Ok((order(one, other) != Some(Ordering::Equal)).into()),
        ("lt" | "le" | "gt" | "ge", [one, other]) => {
            let order = order(one, other).ok_or_else(|| format!("{one} and {other} can't be compared"))?;
            Ok(match name {
                "lt" => order.is_lt(),
                "le" => order.is_le(),
                "gt" => order.is_gt(),
                _ => order.is_ge(),
            }
            .into())
        }
        ("not", [value]) => Ok((!truth(value)).into()),
        ("and", [values @ .., last]) => Ok(values.iter().find(|value| !truth(value)).unwrap_or(last).clone()),
        ("or", [values @ .., last]) => Ok(values.iter().find(|value| truth(value)).unwrap_or(last).clone()),
        _ => Err(format!("there is no function {name:?} of {} arguments", arguments.len())),
    }
}

fn titled(text: &str) -> String {
    let mut start = true;
    text.chars()
        .map(|letter| {
            let upper = start && letter.is_alphabetic();
            start = letter.is_whitespace();
            if upper { letter.to_uppercase().next().unwrap_or(letter) } else { letter }
        })
        .collect()
}

fn index(value: &Value, keys: &[Value]) -> Result<Value, String> {
    let mut value = value;
    for key in keys {
        value = match (value, key) {
            (Value::Object(map), Value::String(key)) => map.get(key).unwrap_or(&Value::Null),
            (Value::Array(items), Value::Number(at)) => at
                .as_u64()
                .and_then(|at| items.get(usize::try_from(at).ok()?))
                .ok_or_else(|| format!("index out of range: {at}"))?,
            _ => return Err(format!("can't index {value} with {key}")),
        };
    }
    Ok(value.clone())
}

fn order(one: &Value, other: &Value) -> Option<Ordering> {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => one.as_f64()?.partial_cmp(&other.as_f64()?),
        (Value::String(one), Value::String(other)) => Some(one.cmp(other)),
        (one, other) => (one == other).then_some(Ordering::Equal),
    }
}

/// `%s %v %d %t %q %%`, with a width.
fn formatted(format: &str, values: &[Value]) -> Result<String, String> {
    let mut out = String::new();
    let mut values = values.iter();
    let mut letters = format.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let left = letters.next_if_eq(&'-').is_some();
        let mut width = String::new();
        while let Some(digit) = letters.next_if(char::is_ascii_digit) {
            width.push(digit);
        }
        let width = width.parse::<usize>().unwrap_or(0).min(4096);
        let mut text = String::new();
        match letters.next() {
            Some('%') => text.push('%'),
            Some('s' | 'v' | 'd' | 't') => show(values.next().ok_or("printf has too few values")?, &mut text),
            Some('q') => {
                show(values.next().ok_or("printf has too few values")?, &mut text);
                text = Value::from(text).to_string();
            }
            other => {
                return Err(format!("printf doesn't know %{}", other.map(String::from).unwrap_or_default()));
            }
        }
        if left {
            out.push_str(&format!("{text:<width$}"));
        } else {
            out.push_str(&format!("{text:>width$}"));
        }
    }
    Ok(out)
}
