//! A template written anew, so that nothing walks a value without counting what it walks.
//!
//! The engine counts instructions and the text that it makes, but not what its operators and filters
//! walk on the way: `a == b`, `a ~ b`, `a in b`, `a | upper` look into lists that lists of other lists
//! hold, and sixty lines are enough for a list that holds another one 2⁶⁰ times. So the syntax tree is
//! read once and written back as a source in which whatever such an operation is about to walk goes
//! through the filter [`COUNTED`] first, which walks it step by step and pays for every one, and lists
//! that were joined or repeated go through [`BOUNDED`]. A line keeps its number.
//!
//! The tree is built, walked and dropped by recursion, so its depth is bounded before: by the length
//! of the source, the words of a tag and the number of `elif`. It still needs a large stack.

use std::fmt::Write as _;

use minijinja::machinery::ast::{
    BinOp, BinOpKind, Call, CallArg, CompareOpKind, Expr, Filter, IfCond, Macro, Stmt, UnaryOpKind,
};
use minijinja::machinery::{Token, parse, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// The filter that walks a value and pays for it.
pub(super) const COUNTED: &str = "counted_";
/// The filter that refuses lists longer than any conversation.
pub(super) const BOUNDED: &str = "bounded_";
/// The filter around what an attribute of a namespace becomes.
pub(super) const KEPT: &str = "kept_";

/// Bytes of a template; the longest that models bring have some tens of thousands.
const MOST_SOURCE: usize = 256 << 10;
/// Words and signs in one tag, each of which can make the tree a level deeper.
const MOST_WORDS: usize = 2_000;
/// `elif`s in a template: each lies in the one before.
const MOST_BRANCHES: usize = 1_000;

/// Filters that look at a value's outside alone, or pay for what they walk.
const SHALLOW_FILTERS: &[&str] = &[
    "abs",
    "batch",
    "bool",
    "chain",
    "count",
    "d",
    "default",
    "escape",
    "e",
    "first",
    "float",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "random",
    "reverse",
    "round",
    "safe",
    "slice",
    "string",
    "tojson",
    "trim",
    "zip",
    COUNTED,
    super::ITERATED,
];
/// Filters whose arguments become part of the result as they are.
const KEPT_ARGUMENTS: &[&str] = &["batch", "chain", "d", "default", "slice", "zip"];
/// Filters that hand items to a test or to another filter, which compare at most what they are given.
const EACH_FILTERS: &[&str] = &["map", "reject", "rejectattr", "select", "selectattr"];
/// Filters whose result may be much longer than what goes in.
const LONG_FILTERS: &[&str] = &["batch", "chain", "slice", "zip"];
/// Tests that look at a value's outside alone.
const SHALLOW_TESTS: &[&str] = &[
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "int",
    "integer",
    "iterable",
    "lower",
    "mapping",
    "none",
    "number",
    "odd",
    "safe",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];

/// Refuses what the engine's parser would follow too deep.
pub(super) fn check_source(source: &str) -> Result<(), Error> {
    let too = |what: String| Err(Error::new(ErrorKind::SyntaxError, what));
    if source.len() > MOST_SOURCE {
        let most = MOST_SOURCE >> 10;
        return too(format!("has {} KiB; expected at most {most}", source.len() >> 10));
    }
    let (mut words, mut branches, mut line, mut first) = (0_usize, 0_usize, 0, false);
    for token in tokenize(source, false, SyntaxConfig::default()) {
        // What is no token is the parser's to say.
        let Ok((token, span)) = token else { break };
        match token {
            Token::VariableStart | Token::BlockStart => {
                (words, line, first) = (0, span.start_line, true);
                continue;
            }
            Token::TemplateData(_) => continue,
            Token::Ident("elif") if first => branches += 1,
            _ => words += 1,
        }
        first = false;
        if words > MOST_WORDS {
            return too(format!(
                "the tag in line {line} has more than {MOST_WORDS} words and signs"
            ));
        }
        if branches > MOST_BRANCHES {
            return too(format!("has more than {MOST_BRANCHES} `elif`"));
        }
    }
    Ok(())
}

/// The template anew, to be read without any trimming of white space.
pub(super) fn rewrite(source: &str, syntax: SyntaxConfig) -> Result<String, Error> {
    let tree = parse(source, super::ONLY, syntax)?;
    let mut writer = Writer { out: String::with_capacity(source.len() * 2), line: 1 };
    if let Stmt::Template(template) = &tree {
        writer.body(&template.children);
    }
    Ok(writer.out)
}

struct Writer {
    out: String,
    /// The line that is being written.
    line: usize,
}

impl Writer {
    fn push(&mut self, text: &str) {
        self.line += text.matches('\n').count();
        self.out.push_str(text);
    }

    /// Opens a tag that stood on `line` in the original.
    fn open(&mut self, tag: &str, line: u16) {
        self.push(tag);
        self.reach(line);
    }

    /// Line breaks, inside a tag, up to the line of the original.
    fn reach(&mut self, line: u16) {
        while self.line < usize::from(line) {
            self.push("\n");
        }
    }

    fn body(&mut self, statements: &[Stmt<'_>]) {
        for statement in statements {
            self.statement(statement);
        }
    }

    fn statement(&mut self, statement: &Stmt<'_>) {
        match statement {
            Stmt::Template(template) => self.body(&template.children),
            // A text that could open a tag, alone or with the next one, goes as a literal.
            Stmt::EmitRaw(raw) if raw.raw.contains('{') => {
                self.push("{{ ");
                self.text(raw.raw);
                self.push(" }}");
            }
            Stmt::EmitRaw(raw) => self.push(raw.raw),
            Stmt::EmitExpr(emitted) => {
                self.open("{{ ", emitted.span().start_line);
                self.expression(&emitted.expr);
                self.push(" }}");
            }
            Stmt::ForLoop(each) => {
                self.open("{% for ", each.span().start_line);
                self.target(&each.target);
                self.push(" in ");
                self.atom(&each.iter);
                if let Some(condition) = &each.filter_expr {
                    self.push(" if ");
                    self.expression(condition);
                }
                self.push(if each.recursive { " recursive %}" } else { " %}" });
                self.body(&each.body);
                if !each.else_body.is_empty() {
                    self.push("{% else %}");
                    self.body(&each.else_body);
                }
                self.push("{% endfor %}");
            }
            Stmt::IfCond(condition) => {
                self.open("{% if ", condition.span().start_line);
                self.branches(condition);
                self.push("{% endif %}");
            }
            Stmt::WithBlock(with) => {
                self.open("{% with ", with.span().start_line);
                for (index, (target, value)) in with.assignments.iter().enumerate() {
                    self.push(if index > 0 { ", " } else { "" });
                    match target {
                        Expr::List(_) => self.nested_target(target),
                        _ => self.target(target),
                    }
                    self.push(" = ");
                    self.expression(value);
                }
                self.push(" %}");
                self.body(&with.body);
                self.push("{% endwith %}");
            }
            Stmt::Set(set) => {
                self.open("{% set ", set.span().start_line);
                self.target(&set.target);
                self.push(" = ");
                if matches!(set.target, Expr::Var(_)) {
                    self.expression(&set.expr);
                } else {
                    self.filtered(&set.expr, KEPT);
                }
                self.push(" %}");
            }
            Stmt::SetBlock(set) => {
                self.open("{% set ", set.span().start_line);
                self.target(&set.target);
                if let Some(filter) = &set.filter {
                    self.push(" | ");
                    self.expression(filter);
                }
                self.push(" %}");
                self.body(&set.body);
                self.push("{% endset %}");
            }
            Stmt::AutoEscape(escape) => {
                self.open("{% autoescape ", escape.span().start_line);
                self.expression(&escape.enabled);
                self.push(" %}");
                self.body(&escape.body);
                self.push("{% endautoescape %}");
            }
            Stmt::FilterBlock(block) => {
                self.open("{% filter ", block.span().start_line);
                self.expression(&block.filter);
                self.push(" %}");
                self.body(&block.body);
                self.push("{% endfilter %}");
            }
            Stmt::Block(block) => {
                self.open("{% block ", block.span().start_line);
                self.push(block.name);
                self.push(" %}");
                self.body(&block.body);
                self.push("{% endblock %}");
            }
            Stmt::Macro(declared) => {
                self.open("{% macro ", declared.span().start_line);
                self.push(declared.name);
                self.parameters(declared);
                self.push(" %}");
                self.body(&declared.body);
                self.push("{% endmacro %}");
            }
            Stmt::CallBlock(block) => {
                self.open("{% call", block.span().start_line);
                self.parameters(&block.macro_decl);
                self.push(" ");
                self.call(&block.call);
                self.push(" %}");
                self.body(&block.macro_decl.body);
                self.push("{% endcall %}");
            }
            Stmt::Continue(_) => self.push("{% continue %}"),
            Stmt::Break(_) => self.push("{% break %}"),
            Stmt::Do(done) => {
                self.open("{% do ", done.span().start_line);
                self.call(&done.call);
                self.push(" %}");
            }
            Stmt::Import(other) => self.alone(other.span().start_line),
            Stmt::FromImport(other) => self.alone(other.span().start_line),
            Stmt::Extends(other) => self.alone(other.span().start_line),
            Stmt::Include(other) => self.alone(other.span().start_line),
        }
    }

    /// In the place of a tag that names another template: there is none.
    fn alone(&mut self, line: u16) {
        self.open("{{ ", line);
        self.push("raise_exception(\"a chat template cannot use other templates\") }}");
    }

    /// A condition with those that follow it, in a loop: there may be many.
    fn branches<'t, 's>(&mut self, mut condition: &'t IfCond<'s>) {
        loop {
            self.expression(&condition.expr);
            self.push(" %}");
            self.body(&condition.true_body);
            match condition.false_body.as_slice() {
                [] => return,
                [Stmt::IfCond(next)] => {
                    self.open("{% elif ", next.span().start_line);
                    condition = next;
                }
                other => {
                    self.push("{% else %}");
                    return self.body(other);
                }
            }
        }
    }

    fn target(&mut self, target: &Expr<'_>) {
        match target {
            Expr::List(list) => {
                for (index, item) in list.items.iter().enumerate() {
                    self.push(if index > 0 { ", " } else { "" });
                    match item {
                        Expr::List(_) => self.nested_target(item),
                        _ => self.target(item),
                    }
                }
                self.push(if list.items.len() == 1 { "," } else { "" });
            }
            Expr::GetAttr(attribute) => {
                self.target(&attribute.expr);
                self.push(".");
                self.push(attribute.name);
            }
            other => self.expression(other),
        }
    }

    fn nested_target(&mut self, target: &Expr<'_>) {
        self.push("(");
        self.target(target);
        self.push(")");
    }

    fn parameters(&mut self, declared: &Macro<'_>) {
        self.push("(");
        let plain = declared.args.len().saturating_sub(declared.defaults.len());
        for (index, name) in declared.args.iter().enumerate() {
            self.push(if index > 0 { ", " } else { "" });
            self.target(name);
            if let Some(default) = index.checked_sub(plain).and_then(|at| declared.defaults.get(at))
            {
                self.push("=");
                self.expression(default);
            }
        }
        self.push(")");
    }

    /// A string literal.
    fn text(&mut self, text: &str) {
        let mut out = String::with_capacity(text.len() + 2);
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                c => out.push(c),
            }
        }
        out.push('"');
        self.push(&out);
    }

    fn constant(&mut self, value: &Value) {
        match value.kind() {
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let number = value.to_string();
                let negative = number.starts_with('-');
                self.push(&if negative { format!("({number})") } else { number });
            }
            ValueKind::Seq => {
                self.push("[");
                for item in value.try_iter().into_iter().flatten() {
                    self.constant(&item);
                    self.push(", ");
                }
                self.push("]");
            }
            _ => self.push("none"),
        }
    }

    /// An expression where no operator stands before or behind it.
    fn expression(&mut self, expression: &Expr<'_>) {
        self.reach(expression.span().start_line);
        match expression {
            Expr::Var(variable) => self.push(variable.id),
            Expr::Const(constant) => self.constant(&constant.value),
            Expr::Slice(slice) => {
                self.atom(&slice.expr);
                self.push("[");
                for (index, part) in
                    [&slice.start, &slice.stop, &slice.step].into_iter().enumerate()
                {
                    self.push(if index > 0 { ":" } else { "" });
                    if let Some(part) = part {
                        self.expression(part);
                    }
                }
                self.push("]");
            }
            Expr::UnaryOp(unary) => {
                self.push(match unary.op {
                    UnaryOpKind::Not => "not ",
                    UnaryOpKind::Neg => "-",
                });
                self.atom(&unary.expr);
            }
            Expr::BinOp(operation) => self.operation(operation),
            Expr::Compare(compared) => {
                self.counted(&compared.expr);
                for next in &compared.ops {
                    self.push(match next.op {
                        CompareOpKind::Eq => " == ",
                        CompareOpKind::Ne => " != ",
                        CompareOpKind::Lt => " < ",
                        CompareOpKind::Lte => " <= ",
                        CompareOpKind::Gt => " > ",
                        CompareOpKind::Gte => " >= ",
                        CompareOpKind::In => " in ",
                        CompareOpKind::NotIn => " not in ",
                    });
                    self.counted(&next.expr);
                }
            }
            Expr::IfExpr(choice) => {
                self.atom(&choice.true_expr);
                self.push(" if ");
                self.atom(&choice.test_expr);
                if let Some(other) = &choice.false_expr {
                    self.push(" else ");
                    self.atom(other);
                }
            }
            Expr::Filter(filter) => self.filter(filter),
            Expr::Test(test) => {
                let shallow = SHALLOW_TESTS.contains(&test.name);
                if shallow {
                    self.atom(&test.expr);
                } else {
                    self.counted(&test.expr);
                }
                self.push(" is ");
                self.push(test.name);
                self.arguments(&test.args, !shallow);
            }
            Expr::GetAttr(attribute) => {
                self.owner(&attribute.expr);
                self.push(".");
                self.push(attribute.name);
            }
            Expr::GetItem(item) => {
                self.atom(&item.expr);
                self.push("[");
                self.counted(&item.subscript_expr);
                self.push("]");
            }
            Expr::Call(call) => self.call(call),
            Expr::List(list) => self.literal(("[", "]"), &list.items),
            Expr::Tuple(tuple) => self.literal(("(", ")"), &tuple.items),
            Expr::Map(map) => {
                let plain = map.values.iter().all(|value| matches!(value, Expr::Const(_)));
                self.push("{");
                for (key, value) in map.keys.iter().zip(&map.values) {
                    self.counted(key);
                    self.push(": ");
                    self.expression(value);
                    self.push(", ");
                }
                self.push("}");
                self.end_literal(plain);
            }
        }
    }

    /// A list or tuple, walked once it is there: so nothing lies too deep in another.
    fn literal(&mut self, (open, close): (&str, &str), items: &[Expr<'_>]) {
        self.push(open);
        for item in items {
            self.expression(item);
            self.push(", ");
        }
        self.push(close);
        self.end_literal(items.iter().all(|item| matches!(item, Expr::Const(_))));
    }

    fn end_literal(&mut self, plain: bool) {
        if !plain {
            self.push("|");
            self.push(COUNTED);
        }
    }

    /// An expression that can stand beside any operator but a dot.
    fn atom(&mut self, expression: &Expr<'_>) {
        let plain = matches!(
            expression,
            Expr::Var(_)
                | Expr::Const(_)
                | Expr::Slice(_)
                | Expr::Filter(_)
                | Expr::GetAttr(_)
                | Expr::GetItem(_)
                | Expr::Call(_)
        );
        if plain {
            return self.expression(expression);
        }
        self.push("(");
        self.expression(expression);
        self.push(")");
    }

    /// An expression with a dot behind it, which would become part of a filter's name or a number.
    fn owner(&mut self, expression: &Expr<'_>) {
        if matches!(expression, Expr::Filter(_) | Expr::Const(_)) {
            self.push("(");
            self.expression(expression);
            self.push(")");
        } else {
            self.atom(expression);
        }
    }

    fn filtered(&mut self, expression: &Expr<'_>, filter: &str) {
        self.atom(expression);
        self.push("|");
        self.push(filter);
    }

    /// An expression whose value is about to be walked.
    fn counted(&mut self, expression: &Expr<'_>) {
        match expression {
            Expr::Const(_) | Expr::Compare(_) | Expr::Test(_) | Expr::UnaryOp(_) => {
                self.atom(expression);
            }
            _ => self.filtered(expression, COUNTED),
        }
    }

    fn operation(&mut self, operation: &BinOp<'_>) {
        // `a + b + c` is written as it stands: every pair of parentheses would be a level more.
        let longer = matches!(operation.op, BinOpKind::Add | BinOpKind::Mul)
            && ![&operation.left, &operation.right].iter().any(|side| match side {
                Expr::Const(constant) => constant.value.kind() == ValueKind::String,
                _ => false,
            });
        if longer {
            self.push("(");
        }
        self.side(&operation.left, operation.op, true);
        self.push(match operation.op {
            BinOpKind::Eq => " == ",
            BinOpKind::Ne => " != ",
            BinOpKind::Lt => " < ",
            BinOpKind::Lte => " <= ",
            BinOpKind::Gt => " > ",
            BinOpKind::Gte => " >= ",
            BinOpKind::ScAnd => " and ",
            BinOpKind::ScOr => " or ",
            BinOpKind::Add => " + ",
            BinOpKind::Sub => " - ",
            BinOpKind::Mul => " * ",
            BinOpKind::Div => " / ",
            BinOpKind::FloorDiv => " // ",
            BinOpKind::Rem => " % ",
            BinOpKind::Pow => " ** ",
            BinOpKind::Concat => " ~ ",
            BinOpKind::In => " in ",
        });
        self.side(&operation.right, operation.op, false);
        if longer {
            self.push(")|");
            self.push(BOUNDED);
        }
    }

    fn side(&mut self, side: &Expr<'_>, op: BinOpKind, left: bool) {
        match (side, op) {
            // Chains: joined from the left, as they are read.
            (Expr::BinOp(inner), BinOpKind::Add | BinOpKind::Sub)
                if left && matches!(inner.op, BinOpKind::Add | BinOpKind::Sub) =>
            {
                self.chain(inner);
            }
            (Expr::BinOp(inner), BinOpKind::ScAnd)
                if left && matches!(inner.op, BinOpKind::ScAnd) =>
            {
                self.chain(inner);
            }
            (Expr::BinOp(inner), BinOpKind::ScOr)
                if left && matches!(inner.op, BinOpKind::ScOr) =>
            {
                self.chain(inner);
            }
            (Expr::BinOp(inner), BinOpKind::Concat)
                if left && matches!(inner.op, BinOpKind::Concat) =>
            {
                self.chain(inner);
            }
            (
                _,
                BinOpKind::ScAnd
                | BinOpKind::ScOr
                | BinOpKind::Add
                | BinOpKind::Sub
                | BinOpKind::Mul
                | BinOpKind::Div
                | BinOpKind::FloorDiv
                | BinOpKind::Rem
                | BinOpKind::Pow,
            ) => self.atom(side),
            _ => self.counted(side),
        }
    }

    /// The left end of a chain, without what is put around a whole one.
    fn chain(&mut self, operation: &BinOp<'_>) {
        self.side(&operation.left, operation.op, true);
        self.push(match operation.op {
            BinOpKind::Add => " + ",
            BinOpKind::Sub => " - ",
            BinOpKind::ScAnd => " and ",
            BinOpKind::ScOr => " or ",
            _ => " ~ ",
        });
        self.side(&operation.right, operation.op, false);
    }

    fn filter(&mut self, filter: &Filter<'_>) {
        let shallow = SHALLOW_FILTERS.contains(&filter.name)
            || (EACH_FILTERS.contains(&filter.name)
                && filter.args.iter().all(|argument| match argument {
                    CallArg::Pos(value) | CallArg::Kwarg(_, value) => {
                        matches!(value, Expr::Const(_))
                    }
                    _ => false,
                }));
        // Without an expression it is the first of a block's.
        if let Some(input) = &filter.expr {
            let is_chain = matches!(input, Expr::Filter(inner) if inner.expr.is_none());
            if shallow || is_chain {
                self.atom(input);
            } else {
                self.counted(input);
            }
            self.push("|");
        }
        self.push(filter.name);
        self.arguments(&filter.args, !KEPT_ARGUMENTS.contains(&filter.name));
        if LONG_FILTERS.contains(&filter.name) {
            self.push("|");
            self.push(BOUNDED);
        }
    }

    fn call(&mut self, call: &Call<'_>) {
        // A function takes its arguments as they are; a method may compare or write them.
        let method = matches!(call.expr, Expr::GetAttr(_));
        if let Expr::GetAttr(attribute) = &call.expr {
            if ["index", "count"].contains(&attribute.name) {
                self.push("(");
                self.counted(&attribute.expr);
                self.push(")");
            } else {
                self.owner(&attribute.expr);
            }
            self.push(".");
            self.push(attribute.name);
        } else {
            self.atom(&call.expr);
        }
        self.push("(");
        self.list(&call.args, method);
        self.push(")");
    }

    fn arguments(&mut self, arguments: &[CallArg<'_>], counted: bool) {
        if !arguments.is_empty() {
            self.push("(");
            self.list(arguments, counted);
            self.push(")");
        }
    }

    fn list(&mut self, arguments: &[CallArg<'_>], counted: bool) {
        for (index, argument) in arguments.iter().enumerate() {
            self.push(if index > 0 { ", " } else { "" });
            let value = match argument {
                CallArg::Pos(value) => value,
                CallArg::Kwarg(name, value) => {
                    let _ = write!(self.out, "{name}=");
                    value
                }
                CallArg::PosSplat(value) => {
                    self.push("*");
                    self.atom(value);
                    continue;
                }
                CallArg::KwargSplat(value) => {
                    self.push("**");
                    self.atom(value);
                    continue;
                }
            };
            if counted {
                self.counted(value);
            } else {
                self.expression(value);
            }
        }
    }
}
