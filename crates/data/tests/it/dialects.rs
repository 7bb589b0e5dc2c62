//! What a record says is what is learned, in whatever dialect it is written: turns with reasoning, calls of tools
//! and marks of what is not trained go through every way of writing them that has room for them.

use hydralora_data::{ChatTemplate, Dataset, IGNORE_LABEL};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::{config, encoder, folder};

/// Writes all that a turn may say, each part between marks of its own.
const ALL: &str = "{% for m in messages %}[{{ m.role }}]\
    {% if m.reasoning_content %}(({{ m.reasoning_content }})){% endif %}{{ m.content or '' }}\
    {% for c in m.tool_calls or [] %}@{{ c.function.name }}({{ c.function.arguments.q }}){% endfor %}\
    {{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

#[derive(Clone, Debug)]
struct Answer {
    asked: String,
    reasoning: Option<String>,
    text: String,
    /// The tool's name, its argument, what it gave, and what was answered then.
    call: Option<[String; 3]>,
    is_trained: bool,
}

fn words() -> impl Strategy<Value = String> {
    "[a-z]{2,6}( [a-z0-9{}\"|é]{1,5}){0,3}[a-z]"
}

fn answer() -> impl Strategy<Value = Answer> {
    let call = prop::option::of((words(), "[a-z_]{3,8}", words()));
    (words(), prop::option::of(words()), words(), call, prop::bool::weighted(0.8)).prop_map(
        |(asked, reasoning, text, call, is_trained)| {
            let call = call.map(|(argument, name, result)| [name, argument, result]);
            Answer { asked, reasoning, text, call, is_trained }
        },
    )
}

/// Which of several ways of writing the same is taken, one after the other.
struct Ways<'a>(std::iter::Cycle<std::slice::Iter<'a, u8>>);

impl Ways<'_> {
    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[usize::from(*self.0.next().unwrap()) % of.len()].clone()
    }
}

/// Marks a turn as one that is not trained.
fn untrained(turn: &mut Value, ways: &mut Ways<'_>) {
    let (name, value) = ways.one(&[
        ("weight", json!(0)),
        ("weight", json!(0.0)),
        ("loss_weight", json!(0)),
        ("train", json!(false)),
        ("training", json!(false)),
        ("trainable", json!(false)),
        ("loss_mask", json!(0)),
        ("mask", json!(0)),
        ("masked", json!(true)),
    ]);
    turn[name] = value;
}

/// As chat APIs write it, and as files without nested types have it.
fn messages(system: Option<&str>, answers: &[Answer], ways: &mut Ways<'_>) -> Value {
    let mut turns = Vec::new();
    let beside = system.is_some() && ways.one(&[true, false]);
    if let Some(system) = system.filter(|_| !beside) {
        turns.push(json!({"role": "system", "content": system}));
    }
    for answer in answers {
        let text = |text: &str, ways: &mut Ways<'_>| match ways.one(&[0, 1, 2]) {
            0 => json!([{"type": "text", "text": text}]),
            1 => json!([{"type": "output_text", "text": text}]),
            _ => json!(text),
        };
        turns.push(json!({"role": "user", "content": text(&answer.asked, ways)}));
        if let Some([name, argument, result]) = &answer.call {
            let arguments =
                ways.one(&[json!({"q": argument}), json!(json!({"q": argument}).to_string())]);
            let function = json!({"name": name, "arguments": arguments});
            let list = json!([{"id": "c1", "type": "function", "function": function}]);
            let mut turn =
                json!({"role": "assistant", "content": ways.one(&[json!(null), json!("")])});
            match ways.one(&[0, 1, 2, 3]) {
                0 => turn["tool_calls"] = list,
                1 => turn["tool_calls"] = list.to_string().into(),
                2 => turn["function_call"] = function,
                _ => turn["function_call"] = function.to_string().into(),
            }
            if !answer.is_trained {
                untrained(&mut turn, ways);
            }
            turns.push(turn);
            let role = ways.one(&["tool", "function"]);
            turns.push(json!({"role": role, "tool_call_id": "c1", "content": result}));
        }
        let mut turn = json!({"role": "assistant", "content": text(&answer.text, ways)});
        if let Some(reasoning) = &answer.reasoning {
            match ways.one(&[0, 1, 2, 3]) {
                0 => turn["reasoning_content"] = json!(reasoning),
                1 => turn["thinking"] = json!(reasoning),
                2 => turn["reasoning"] = json!(reasoning),
                _ => {
                    let kind = ways.one(&["reasoning", "thinking"]);
                    let parts = [
                        json!({"type": kind, kind: reasoning}),
                        json!({"type": "text", "text": answer.text}),
                    ];
                    turn["content"] = Value::from(parts.to_vec());
                }
            }
        }
        if !answer.is_trained {
            untrained(&mut turn, ways);
        }
        turns.push(turn);
    }
    let mut record = json!({"messages": turns});
    if beside {
        record["system"] = json!(system);
    }
    record
}

/// As ShareGPT and those after it write it.
fn sharegpt(system: Option<&str>, answers: &[Answer], ways: &mut Ways<'_>) -> Value {
    let mut turns = Vec::new();
    let mut record = json!({});
    match (system, ways.one(&[0, 1, 2])) {
        (Some(system), 0) => record["system"] = json!(system),
        (Some(system), 1) => turns.push(json!({"from": "system", "value": system})),
        (Some(system), _) => {
            record["system"] = json!(system);
            turns.push(json!({"from": "system", "value": system}));
        }
        (None, _) => {}
    }
    for answer in answers {
        turns.push(json!({"from": ways.one(&["human", "user"]), "value": answer.asked}));
        if let Some([name, argument, result]) = &answer.call {
            let call = json!({"name": name, "arguments": {"q": argument}});
            let value = ways.one(&[call.to_string(), json!([call]).to_string()]);
            let mut turn =
                json!({"from": ways.one(&["function_call", "tool_call"]), "value": value});
            if !answer.is_trained {
                untrained(&mut turn, ways);
            }
            turns.push(turn);
            turns.push(json!({"from": ways.one(&["observation", "tool"]), "value": result}));
        }
        let mut turn = json!({"from": ways.one(&["gpt", "assistant"]), "value": answer.text});
        if let Some(reasoning) = &answer.reasoning {
            turn[ways.one(&["reasoning_content", "thinking"])] = json!(reasoning);
        }
        if !answer.is_trained {
            untrained(&mut turn, ways);
        }
        turns.push(turn);
    }
    record["conversations"] = json!(turns);
    record
}

/// As Alpaca's records have it, which know neither tools nor untrained turns; only the last answer may reason.
fn alpaca(system: Option<&str>, answers: &[Answer], ways: &mut Ways<'_>) -> Option<Value> {
    let (last, earlier) = answers.split_last()?;
    let plain = |answer: &Answer| answer.call.is_none() && answer.is_trained;
    if !answers.iter().all(plain) || earlier.iter().any(|answer| answer.reasoning.is_some()) {
        return None;
    }
    let mut record = json!({"instruction": last.asked, "output": last.text});
    if ways.one(&[true, false]) {
        record["input"] = json!("");
    }
    if let Some(system) = system {
        record["system"] = json!(system);
    }
    if let Some(reasoning) = &last.reasoning {
        record[ways.one(&["thinking", "reasoning", "reasoning_content"])] = json!(reasoning);
    }
    if !earlier.is_empty() {
        let pairs: Vec<[&str; 2]> = earlier.iter().map(|a| [&*a.asked, &*a.text]).collect();
        record["history"] = ways.one(&[json!(pairs), json!(json!(pairs).to_string())]);
    }
    Some(record)
}

/// What is to be trained, turn by turn.
fn expected(answers: &[Answer]) -> String {
    let mut expected = String::new();
    for answer in answers.iter().filter(|answer| answer.is_trained) {
        if let Some([name, argument, _]) = &answer.call {
            expected += &format!("@{name}({argument})</s>");
        }
        if let Some(reasoning) = &answer.reasoning {
            expected += &format!("(({reasoning}))");
        }
        expected += &format!("{}</s>", answer.text);
    }
    expected
}

fn loaded(record: &Value) -> Dataset {
    let folder = folder(&[("x.jsonl", format!("{record}\n").as_bytes())]);
    let template = ChatTemplate::from_source("all", ALL).unwrap();
    let mut config = config(&["x.jsonl"]);
    config.template = None;
    config.max_seq_len = 4096;
    Dataset::load(&config, folder.path(), &encoder(), Some(&template), 1)
        .unwrap_or_else(|error| panic!("{error}: {record}"))
}

/// What is read with a loss and what is read without.
fn texts(dataset: &Dataset) -> [String; 2] {
    let (mut trained, mut given) = (Vec::new(), Vec::new());
    for example in dataset.train.iter().map(Result::unwrap) {
        for (&token, &label) in example.tokens.iter().zip(&example.labels) {
            if label == IGNORE_LABEL { given.push(token) } else { trained.push(token) }
        }
    }
    [encoder().decode(&trained), encoder().decode(&given)]
}

fn lost(dataset: &Dataset) -> Vec<String> {
    let source = &dataset.report.sources[0];
    source.unread_fields.keys().chain(source.unwritten_fields.keys()).cloned().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn what_a_record_says_is_learned_in_every_dialect(
        system in prop::option::of(words()),
        answers in prop::collection::vec(answer(), 1..4),
        ways in prop::collection::vec(any::<u8>(), 1..24),
    ) {
        prop_assume!(answers.iter().any(|answer| answer.is_trained));
        let mut ways = Ways(ways.iter().cycle());
        let system = system.as_deref();
        let mut records = vec![messages(system, &answers, &mut ways), sharegpt(system, &answers, &mut ways)];
        records.extend(alpaca(system, &answers, &mut ways));
        for record in records {
            let dataset = loaded(&record);
            let [trained, given] = texts(&dataset);
            prop_assert_eq!(&trained, &expected(&answers), "{}", record);
            prop_assert_eq!(system.is_some(), given.contains("[system]"), "{}", record);
            for answer in &answers {
                prop_assert!(given.contains(&format!("[user]{}", answer.asked)), "{}", record);
                if let Some([_, _, result]) = &answer.call {
                    prop_assert!(given.contains(&format!("[tool]{result}")), "{}", record);
                }
            }
            prop_assert_eq!(lost(&dataset), Vec::<String>::new(), "{}", record);
        }
    }

    /// A field that nobody reads is counted by its name, wherever it stands and whatever it holds.
    #[test]
    fn a_field_that_is_lost_is_named(
        name in "zz_[a-z]{1,6}",
        kind in 0_usize..6,
        of_turn in any::<bool>(),
        shared in any::<bool>(),
    ) {
        let value = [json!("text"), json!(true), json!(false), json!(3), json!(["a"]), json!({"a": 1})][kind].clone();
        let key = if shared { "conversations" } else { "messages" };
        let [who, what] = if shared { ["from", "value"] } else { ["role", "content"] };
        let mut turn = json!({who: "assistant", what: "one"});
        let mut beside = Map::new();
        if of_turn { turn[&name] = value } else { drop(beside.insert(name.clone(), value)) }
        let mut record = json!({key: [{who: "user", what: "A"}, turn]});
        record.as_object_mut().unwrap().extend(beside);
        prop_assert_eq!(lost(&loaded(&record)), vec![name], "{}", record);
    }
}

/// Fields whose words a template has for other things, and that it does not write.
#[test]
fn a_word_in_a_template_is_no_proof_that_it_writes_a_field() {
    let turns = json!([{"role": "user", "content": "A", "name": "Alice"}, {"role": "assistant", "content": "one"}]);
    assert_eq!(lost(&loaded(&json!({"messages": turns}))), ["name"]);
    let turns = json!([{"role": "user", "content": "A"}, {"role": "assistant", "content": "one"}]);
    let arguments = json!({"messages": turns, "chat_template_kwargs": {"colour": "red"}});
    assert_eq!(lost(&loaded(&arguments)), ["colour"]);
    let tools = json!({"messages": turns, "tools": [{"name": "f"}]});
    assert_eq!(lost(&loaded(&tools)), ["tools"]);
    let two = json!({"messages": [{"role": "system", "content": "a"}, turns[0], turns[1]], "system": "b"});
    assert_eq!(lost(&loaded(&two)), ["system"]);
}

/// Values that cannot be what their names say are refused by name, and not left out.
#[test]
fn fields_that_cannot_be_read_are_refused() {
    let fault = |record: Value| {
        let folder = folder(&[("x.jsonl", format!("{record}\n").as_bytes())]);
        crate::load(&config(&["x.jsonl"]), folder.path()).unwrap_err().to_string()
    };
    let turn = |name: &str, value: Value| {
        let mut turn = json!({"role": "assistant", "content": "b"});
        turn[name] = value;
        json!({"messages": [{"role": "user", "content": "a"}, turn]})
    };
    for (name, value) in [
        ("tool_calls", json!("call f")),
        ("tool_calls", json!(["f"])),
        ("tool_calls", json!(true)),
        ("function_call", json!("f()")),
        ("function_call", json!(3)),
        ("masked", json!("yes")),
        ("training", json!("no")),
        ("loss_weight", json!(0.5)),
    ] {
        let message = fault(turn(name, value.clone()));
        assert!(message.contains(&format!("messages[1].{name}")), "{name} {value}: {message}");
    }
    let mut record = turn("weight", json!(1));
    record["functions"] = json!({"name": "f"});
    assert!(fault(record.clone()).contains("functions"));
    record["functions"] = json!([{"name": "f"}]);
    record["tools"] = json!([{"type": "function", "function": {"name": "g"}}]);
    assert!(fault(record).contains("functions"));
}
