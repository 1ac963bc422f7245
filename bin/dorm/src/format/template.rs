//! Templates in the syntax of Go's text/template, over JSON.

use serde_json::Value;

use super::evaluate::Scope;
use super::parse::{Node, parse};

/// A template that was understood.
#[derive(Debug)]
pub(crate) struct Template {
    nodes: Vec<Node>,
}

impl Template {
    /// Understands a template; `\t` and `\n` outside of actions are what they are in C, as for docker.
    pub(crate) fn new(text: &str) -> Result<Self, String> {
        let text = text.replace("\\t", "\t").replace("\\n", "\n");
        Ok(Self { nodes: parse(&text).map_err(|error| format!("template parsing error: {error}"))? })
    }

    /// The text that it gives for a value.
    pub(crate) fn apply(&self, value: &Value) -> Result<String, String> {
        let mut out = String::new();
        Scope::new(value).write(&self.nodes, &mut out)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn apply(template: &str, value: &Value) -> Result<String, String> {
        Template::new(template)?.apply(value)
    }

    #[test]
    fn templates_give_what_go_gives() {
        let value = json!({
            "Id": "sha256:0123", "Name": "/a b", "State": {"Running": true, "Pid": 7, "Error": ""},
            "Tags": ["x", "y"], "Map": {"k": "v", "a": 1}, "None": null, "Ports": {"80/tcp": [{"HostPort": "8080"}]},
        });
        for (template, wanted) in [
            ("{{.Id}} {{.ID}}", "sha256:0123 sha256:0123"),
            ("{{.State.Running}}\\t{{.State.Pid}}", "true\t7"),
            ("{{json .Tags}}{{json .Map}}", r#"["x","y"]{"k":"v","a":1}"#),
            ("{{.Tags}} {{.Map}}", "[x y] map[a:1 k:v]"),
            ("{{range .Tags}}<{{.}}>{{end}}", "<x><y>"),
            ("{{range $i, $t := .Tags}}{{if $i}},{{end}}{{$t}}{{end}}", "x,y"),
            ("{{range .None}}x{{else}}nothing{{end}}", "nothing"),
            ("{{if .State.Error}}e{{else if .State.Running}}r{{else}}s{{end}}", "r"),
            ("{{with .State}}{{.Pid}}{{end}}{{with .None}}x{{else}}y{{end}}", "7y"),
            ("{{join .Tags \"-\"}} {{upper .Name}} {{title \"ab\"}}", "x-y /A B Ab"),
            ("{{index .Map \"k\"}} {{index .Tags 1}}", "v y"),
            ("{{(index (index .Ports \"80/tcp\") 0).HostPort}}", "8080"),
            ("{{.Name | printf \"%-6s|%q\" \"n\"}}", "n     |\"/a b\""),
            ("{{range split .Name \" \"}}[{{.}}]{{end}}", "[/a][b]"),
            (
                "{{eq .State.Pid 7}} {{ne .Id \"x\"}} {{lt 1 2}} {{and .Tags .None}}",
                "true true true <no value>",
            ),
            ("{{not .None}} {{or .None \"d\"}} {{len .Tags}} {{truncate .Id 6}}", "true d 2 sha256"),
            ("{{$x := .State.Pid}}{{$x}} {{println .Id}}", "7 sha256:0123\n"),
            ("a {{- \" b \" -}} c", "a b c"),
            ("{{pad \"x\" 1 2}}|", " x  |"),
        ] {
            assert_eq!(apply(template, &value).as_deref(), Ok(wanted), "{template}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_an_error_and_never_a_guess() {
        let value = json!({"A": 1});
        for template in [
            "{{.B}}",
            "{{.A.B}}",
            "{{$x}}",
            "{{nope 1}}",
            "{{index .A 1}}",
            "{{end}}",
            "{{if}}x{{end}}",
            "{{if .A}}",
        ] {
            assert!(apply(template, &value).is_err(), "{template}");
        }
        let deep = format!("{}1{}", "{{if .A}}".repeat(100), "{{end}}".repeat(100));
        assert!(apply(&deep, &value).is_err());
    }
}
