//! Lists: a table, JSON lines, or a template for each row.

use std::io::{self, Write};

use serde_json::{Map, Value};

use super::table::align;
use super::template::Template;
use crate::error::{Done, Failure, SUCCESS};

/// A list of things, each of which has the same fields.
#[derive(Debug)]
pub(crate) struct Listing {
    /// Every field with its header.
    columns: &'static [(&'static str, &'static str)],
    /// The fields of the table that is printed when nothing else is asked for.
    usual: Vec<&'static str>,
    rows: Vec<Row>,
}

/// One of the things.
#[derive(Debug, Default)]
pub(crate) struct Row {
    fields: Map<String, Value>,
    labels: Map<String, Value>,
}

impl Row {
    /// One more field.
    #[must_use]
    pub(crate) fn with(mut self, field: &str, value: impl Into<String>) -> Self {
        self.fields.insert(field.to_owned(), Value::String(value.into()));
        self
    }

    /// The field `Labels`, and the method `.Label "key"`.
    #[must_use]
    pub(crate) fn labels(mut self, labels: &Value) -> Self {
        let labels = labels.as_object().cloned().unwrap_or_default();
        let mut pairs: Vec<_> = labels
            .iter()
            .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
            .collect();
        pairs.sort();
        self.labels = labels;
        self.with("Labels", pairs.join(","))
    }

    /// One line of JSON, its keys in order, as docker writes it.
    fn json(&self) -> String {
        let mut fields: Vec<_> = self.fields.iter().collect();
        fields.sort_by_key(|(key, _)| *key);
        let fields: Map<String, Value> =
            fields.into_iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        Value::Object(fields)
            .to_string()
            .replace('<', "\\u003c")
            .replace('>', "\\u003e")
            .replace('&', "\\u0026")
    }

    fn for_template(&self) -> Value {
        let mut fields = self.fields.clone();
        fields.insert("Label".to_owned(), Value::Object(self.labels.clone()));
        Value::Object(fields)
    }
}

impl Listing {
    /// An empty list. `usual` names the fields of its usual table.
    pub(crate) fn new(columns: &'static [(&'static str, &'static str)], usual: &[&'static str]) -> Self {
        Self { columns, usual: usual.to_vec(), rows: Vec::new() }
    }

    pub(crate) fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// The list as `--format` asks for it; `quiet` names the field that `-q` leaves of the table.
    pub(crate) fn text(&self, format: Option<&str>, quiet: Option<&str>) -> Result<String, Failure> {
        let wrong = |error: String| {
            Failure::new(error).hint("--format takes table, json, or a template such as '{{.ID}}'")
        };
        match format.unwrap_or("table").trim() {
            "table" => match quiet {
                Some(field) => {
                    self.lines(&Template::new(&format!("{{{{.{field}}}}}")).map_err(wrong)?).map_err(wrong)
                }
                None => {
                    let cells: Vec<_> = self.usual.iter().map(|field| format!("{{{{.{field}}}}}")).collect();
                    self.table(&cells.join("\t")).map_err(wrong)
                }
            },
            "json" => Ok(self.rows.iter().map(|row| row.json() + "\n").collect()),
            template => match template.strip_prefix("table") {
                Some(template) => self.table(template.trim_start()).map_err(wrong),
                None if template == "{{json .}}" => {
                    Ok(self.rows.iter().map(|row| row.json() + "\n").collect())
                }
                None => self.lines(&Template::new(template).map_err(wrong)?).map_err(wrong),
            },
        }
    }

    /// All rows, as templates see them.
    pub(crate) fn rows(&self) -> Value {
        self.rows.iter().map(Row::for_template).collect()
    }

    /// Prints it.
    pub(crate) fn print(&self, format: Option<&str>, quiet: Option<&str>) -> Done {
        io::stdout().write_all(self.text(format, quiet)?.as_bytes())?;
        Ok(SUCCESS)
    }

    fn lines(&self, template: &Template) -> Result<String, String> {
        let mut out = String::new();
        for row in &self.rows {
            out.push_str(&template.apply(&row.for_template())?);
            out.push('\n');
        }
        Ok(out)
    }

    fn table(&self, template: &str) -> Result<String, String> {
        let template = Template::new(template)?;
        let mut headers: Map<String, Value> =
            self.columns.iter().map(|(field, header)| ((*field).to_owned(), (*header).into())).collect();
        headers.insert("Label".to_owned(), Value::Object(Map::new()));
        let header = template.apply(&Value::Object(headers))? + "\n";
        Ok(align(&(header + &self.lines(&template)?)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn listing() -> Listing {
        let mut listing =
            Listing::new(&[("ID", "ID"), ("Name", "NAME"), ("Labels", "LABELS")], &["ID", "Name"]);
        let labels = json!({"b": "2", "a": "<1>"});
        listing.push(Row::default().with("Name", "one").with("ID", "1").labels(&labels));
        listing
    }

    #[test]
    fn a_list_is_a_table_lines_of_json_or_what_a_template_makes_of_it() {
        let text = |format, quiet| listing().text(format, quiet).ok();
        assert_eq!(text(None, None).as_deref(), Some("ID        NAME\n1         one\n"));
        assert_eq!(text(None, Some("ID")).as_deref(), Some("1\n"));
        assert_eq!(text(Some("{{.Name}}/{{.Label \"a\"}}"), None).as_deref(), Some("one/<1>\n"));
        assert_eq!(
            text(Some("table {{.Name}}\\t{{.ID}}"), None).as_deref(),
            Some("NAME      ID\none       1\n")
        );
        let json = "{\"ID\":\"1\",\"Labels\":\"a=\\u003c1\\u003e,b=2\",\"Name\":\"one\"}\n";
        assert_eq!(text(Some("json"), None).as_deref(), Some(json));
        assert_eq!(text(Some("{{.Nope}}"), None), None);
    }
}
