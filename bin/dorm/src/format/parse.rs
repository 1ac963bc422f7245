//! The tree of a template.

use serde_json::Value;

use super::token::{Piece, Token, pieces};

/// Deepest nesting of blocks and parentheses.
const DEPTH_MAX: usize = 50;

/// What a template is made of.
#[derive(Debug)]
pub(crate) enum Node {
    Text(String),
    Output(Pipeline),
    Set(String, Pipeline),
    /// Each condition with its nodes; the last has none if there is an `else`.
    If(Vec<(Option<Pipeline>, Vec<Node>)>),
    Range {
        names: Vec<String>,
        over: Pipeline,
        body: Vec<Node>,
        otherwise: Vec<Node>,
    },
    With {
        name: Option<String>,
        of: Pipeline,
        body: Vec<Node>,
        otherwise: Vec<Node>,
    },
}

/// Commands of which each gets the last one's result as its last argument.
#[derive(Debug)]
pub(crate) struct Pipeline(pub(crate) Vec<Vec<Operand>>);

/// One operand of a command.
#[derive(Debug)]
pub(crate) enum Operand {
    Function(String),
    Field(Vec<String>),
    Variable(String, Vec<String>),
    Literal(Value),
    Inner(Pipeline, Vec<String>),
}

struct Parser {
    pieces: std::vec::IntoIter<Piece>,
    depth: usize,
}

/// What ended a list of nodes.
#[derive(Debug, PartialEq)]
enum Ended {
    Template,
    End,
    Else(Vec<Token>),
}

/// Parses a whole template.
pub(crate) fn parse(template: &str) -> Result<Vec<Node>, String> {
    let mut parser = Parser { pieces: pieces(template)?.into_iter(), depth: 0 };
    match parser.nodes()? {
        (nodes, Ended::Template) => Ok(nodes),
        (_, ended) => Err(format!("unexpected {}", if ended == Ended::End { "{{end}}" } else { "{{else}}" })),
    }
}

impl Parser {
    fn nodes(&mut self) -> Result<(Vec<Node>, Ended), String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err("blocks are nested too deeply".to_owned());
        }
        let mut nodes = Vec::new();
        let ended = loop {
            match self.pieces.next() {
                None => break Ended::Template,
                Some(Piece::Text(text)) => nodes.push(Node::Text(text)),
                Some(Piece::Action(tokens)) => {
                    let mut tokens = tokens;
                    let word = match tokens.first() {
                        Some(Token::Word(word)) => word.clone(),
                        _ => String::new(),
                    };
                    match word.as_str() {
                        "end" => break Ended::End,
                        "else" => break Ended::Else(tokens.split_off(1)),
                        "if" => nodes.push(self.branches(tokens.split_off(1))?),
                        "range" => nodes.push(self.range(tokens.split_off(1))?),
                        "with" => nodes.push(self.with(tokens.split_off(1))?),
                        _ => nodes.push(output(tokens)?),
                    }
                }
            }
        };
        self.depth -= 1;
        Ok((nodes, ended))
    }

    fn branches(&mut self, condition: Vec<Token>) -> Result<Node, String> {
        let mut branches = Vec::new();
        let mut condition = Some(pipeline(condition)?);
        loop {
            let last = condition.is_none();
            let (nodes, ended) = self.nodes()?;
            branches.push((condition.take(), nodes));
            match ended {
                Ended::End => return Ok(Node::If(branches)),
                Ended::Else(_) if last => return Err("an {{else}} comes after the last".to_owned()),
                Ended::Else(mut rest) if rest.first() == Some(&Token::Word("if".to_owned())) => {
                    condition = Some(pipeline(rest.split_off(1))?);
                }
                Ended::Else(_) => {}
                Ended::Template => return Err("{{end}} is missing".to_owned()),
            }
        }
    }

    /// The body of a block, and what stands after its `else`.
    fn body(&mut self) -> Result<(Vec<Node>, Vec<Node>), String> {
        let (body, ended) = self.nodes()?;
        match ended {
            Ended::End => Ok((body, Vec::new())),
            Ended::Else(_) => match self.nodes()? {
                (otherwise, Ended::End) => Ok((body, otherwise)),
                _ => Err("{{end}} is missing".to_owned()),
            },
            Ended::Template => Err("{{end}} is missing".to_owned()),
        }
    }

    fn range(&mut self, tokens: Vec<Token>) -> Result<Node, String> {
        let (names, over) = assigned(tokens)?;
        let over = pipeline(over)?;
        let (body, otherwise) = self.body()?;
        Ok(Node::Range { names, over, body, otherwise })
    }

    fn with(&mut self, tokens: Vec<Token>) -> Result<Node, String> {
        let (names, of) = assigned(tokens)?;
        let of = pipeline(of)?;
        let (body, otherwise) = self.body()?;
        Ok(Node::With { name: names.into_iter().next(), of, body, otherwise })
    }
}

/// `$a, $b := REST`, the names without their dollar.
fn assigned(mut tokens: Vec<Token>) -> Result<(Vec<String>, Vec<Token>), String> {
    let Some(at) = tokens.iter().position(|token| *token == Token::Assign) else {
        return Ok((Vec::new(), tokens));
    };
    let rest = tokens.split_off(at + 1);
    let mut names = Vec::new();
    for token in tokens {
        match token {
            Token::Variable(name, fields) if fields.is_empty() => names.push(name),
            Token::Comma | Token::Assign => {}
            other => return Err(format!("{other:?} can't be assigned to")),
        }
    }
    Ok((names, rest))
}

fn output(tokens: Vec<Token>) -> Result<Node, String> {
    let (names, rest) = assigned(tokens)?;
    let pipeline = pipeline(rest)?;
    Ok(match names.into_iter().next() {
        Some(name) => Node::Set(name, pipeline),
        None => Node::Output(pipeline),
    })
}

fn pipeline(tokens: Vec<Token>) -> Result<Pipeline, String> {
    let mut tokens = tokens.into_iter();
    match commands(&mut tokens, 0)? {
        (pipeline, None) => Ok(pipeline),
        (_, Some(_)) => Err("unexpected )".to_owned()),
    }
}

/// Commands up to the end or to a `)`, whose fields are given then.
fn commands(
    tokens: &mut std::vec::IntoIter<Token>,
    depth: usize,
) -> Result<(Pipeline, Option<Vec<String>>), String> {
    if depth > DEPTH_MAX {
        return Err("parentheses are nested too deeply".to_owned());
    }
    let (mut done, mut command, mut closed) = (Vec::new(), Vec::new(), None);
    while let Some(token) = tokens.next() {
        command.push(match token {
            Token::Word(name) => Operand::Function(name),
            Token::Field(fields) => Operand::Field(fields),
            Token::Variable(name, fields) => Operand::Variable(name, fields),
            Token::Literal(value) => Operand::Literal(value),
            Token::Open => match commands(tokens, depth + 1)? {
                (inner, Some(fields)) => Operand::Inner(inner, fields),
                (_, None) => return Err("a parenthesis is not closed".to_owned()),
            },
            Token::Pipe if !command.is_empty() => {
                done.push(std::mem::take(&mut command));
                continue;
            }
            Token::Close(fields) => {
                closed = Some(fields);
                break;
            }
            Token::Pipe | Token::Assign | Token::Comma => return Err("a command is missing".to_owned()),
        });
    }
    if command.is_empty() {
        return Err("a command is missing".to_owned());
    }
    done.push(command);
    Ok((Pipeline(done), closed))
}
