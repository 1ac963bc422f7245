//! Templates at work.

use std::fmt::Write as _;

use serde_json::Value;

use super::function;
use super::parse::{Node, Operand, Pipeline};

/// What names mean at one place of a template.
pub(crate) struct Scope<'a> {
    dot: &'a Value,
    variables: Vec<(String, Value)>,
}

impl<'a> Scope<'a> {
    pub(crate) fn new(value: &'a Value) -> Self {
        Self { dot: value, variables: vec![(String::new(), value.clone())] }
    }

    fn inner<'b>(&self, dot: &'b Value) -> Scope<'b> {
        Scope { dot, variables: self.variables.clone() }
    }

    pub(crate) fn write(&mut self, nodes: &[Node], out: &mut String) -> Result<(), String> {
        for node in nodes {
            match node {
                Node::Text(text) => out.push_str(text),
                Node::Output(pipeline) => show(&self.value(pipeline)?, out),
                Node::Set(name, pipeline) => {
                    let value = self.value(pipeline)?;
                    self.variables.push((name.clone(), value));
                }
                Node::If(branches) => self.branch(branches, out)?,
                Node::Range { names, over, body, otherwise } => {
                    self.range(names, over, body, otherwise, out)?
                }
                Node::With { name, of, body, otherwise } => {
                    let value = self.value(of)?;
                    if truth(&value) {
                        let mut inner = self.inner(&value);
                        inner.variables.extend(name.iter().map(|name| (name.clone(), value.clone())));
                        inner.write(body, out)?;
                    } else {
                        self.inner(self.dot).write(otherwise, out)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn branch(&self, branches: &[(Option<Pipeline>, Vec<Node>)], out: &mut String) -> Result<(), String> {
        for (condition, nodes) in branches {
            let so = match condition {
                Some(pipeline) => truth(&self.value(pipeline)?),
                None => true,
            };
            if so {
                return self.inner(self.dot).write(nodes, out);
            }
        }
        Ok(())
    }

    fn range(
        &self,
        names: &[String],
        over: &Pipeline,
        body: &[Node],
        otherwise: &[Node],
        out: &mut String,
    ) -> Result<(), String> {
        let items: Vec<(Value, Value)> = match self.value(over)? {
            Value::Array(items) => {
                items.into_iter().enumerate().map(|(index, item)| (index.into(), item)).collect()
            }
            Value::Object(map) => {
                let mut items: Vec<_> = map.into_iter().collect();
                items.sort_by(|one, other| one.0.cmp(&other.0));
                items.into_iter().map(|(key, item)| (key.into(), item)).collect()
            }
            Value::Null => Vec::new(),
            other => return Err(format!("range can't iterate over {other}")),
        };
        if items.is_empty() {
            return self.inner(self.dot).write(otherwise, out);
        }
        for (key, item) in items {
            let mut inner = self.inner(&item);
            match names {
                [] => {}
                [value] => inner.variables.push((value.clone(), item.clone())),
                [index, value, ..] => {
                    inner.variables.push((index.clone(), key));
                    inner.variables.push((value.clone(), item.clone()));
                }
            }
            inner.write(body, out)?;
        }
        Ok(())
    }

    fn value(&self, pipeline: &Pipeline) -> Result<Value, String> {
        let mut last = None;
        for command in &pipeline.0 {
            last = Some(self.command(command, last.take())?);
        }
        Ok(last.unwrap_or(Value::Null))
    }

    fn command(&self, command: &[Operand], piped: Option<Value>) -> Result<Value, String> {
        let Some((first, rest)) = command.split_first() else { return Ok(Value::Null) };
        let mut arguments =
            rest.iter().map(|operand| self.operand(operand)).collect::<Result<Vec<_>, _>>()?;
        arguments.extend(piped);
        match first {
            Operand::Function(name) => function::call(name, arguments),
            // The one method that rows have: `.Label "key"`.
            Operand::Field(fields)
                if fields.last().is_some_and(|name| name == "Label") && arguments.len() == 1 =>
            {
                let labels = self.operand(first)?;
                Ok(labels
                    .get(arguments[0].as_str().unwrap_or_default())
                    .cloned()
                    .unwrap_or_else(|| "".into()))
            }
            operand if arguments.is_empty() => self.operand(operand),
            _ => Err("only a function takes arguments".to_owned()),
        }
    }

    fn operand(&self, operand: &Operand) -> Result<Value, String> {
        match operand {
            Operand::Function(name) => function::call(name, Vec::new()),
            Operand::Field(fields) => fields_of(self.dot, fields),
            Operand::Variable(name, fields) => {
                let found = self.variables.iter().rev().find(|(known, _)| known == name);
                fields_of(&found.ok_or_else(|| format!("undefined variable \"${name}\""))?.1, fields)
            }
            Operand::Literal(value) => Ok(value.clone()),
            Operand::Inner(pipeline, fields) => fields_of(&self.value(pipeline)?, fields),
        }
    }
}

/// Go's names of fields differ from those in JSON by case only: `.ID` is `Id`.
fn fields_of(value: &Value, fields: &[String]) -> Result<Value, String> {
    let mut value = value;
    for field in fields {
        let map = value.as_object().ok_or_else(|| format!("can't evaluate field {field} in {value}"))?;
        value = map
            .get(field)
            .or_else(|| map.iter().find(|(key, _)| key.eq_ignore_ascii_case(field)).map(|(_, value)| value))
            .ok_or_else(|| format!("there is no field {field:?}"))?;
    }
    Ok(value.clone())
}

/// What counts as true: everything but Go's zero values.
pub(super) fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(so) => *so,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// As Go's `%v` shows it.
pub(super) fn show(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("<no value>"),
        Value::String(text) => out.push_str(text),
        Value::Bool(_) | Value::Number(_) => {
            let _ = write!(out, "{value}");
        }
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(' ');
                }
                show(item, out);
            }
            out.push(']');
        }
        Value::Object(map) => {
            let mut keys: Vec<_> = map.iter().collect();
            keys.sort_by_key(|(key, _)| *key);
            out.push_str("map[");
            for (index, (key, item)) in keys.into_iter().enumerate() {
                if index > 0 {
                    out.push(' ');
                }
                let _ = write!(out, "{key}:");
                show(item, out);
            }
            out.push(']');
        }
    }
}
