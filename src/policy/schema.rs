// SPDX-License-Identifier: MIT OR Apache-2.0
//! JSON Schema of a [`Layout`].

use serde_json::{Map, Value, json};

use super::btf::{Field, FieldType, Layout};

impl Layout {
    /// JSON Schema of the members: an object with `properties` and `required`, to be merged into
    /// the schema of the object they stand in.
    pub fn schema(&self) -> Value {
        self.schema_of(Field::schema)
    }

    /// As [`schema`](Self::schema), for an action: scalars may also be `{"from": "element"}`.
    pub fn schema_of_action(&self) -> Value {
        self.schema_of(|field| {
            if !field.can_come_from_element() {
                return field.schema();
            }
            let value = field.value_schema();
            described(field, json!({ "anyOf": [value, from_element()] }))
        })
    }

    fn schema_of(&self, schema: impl Fn(&Field) -> Value) -> Value {
        let properties: Map<String, Value> = self
            .fields
            .iter()
            .map(|field| (field.name.clone(), schema(field)))
            .collect();
        let required: Vec<&str> = self
            .fields
            .iter()
            .filter(|field| field.required)
            .map(|field| field.name.as_str())
            .collect();
        json!({ "properties": properties, "required": required })
    }
}

impl Field {
    /// JSON Schema of the member, with description and default.
    pub fn schema(&self) -> Value {
        described(self, self.value_schema())
    }

    fn value_schema(&self) -> Value {
        let item = self.item_schema();
        match &self.array {
            Some(array) if self.ty != FieldType::Bytes => json!({
                "anyOf": [item, {
                    "type": "array",
                    "items": item,
                    "minItems": 1,
                    "maxItems": array.capacity,
                }]
            }),
            _ => item,
        }
    }

    fn item_schema(&self) -> Value {
        let (low, high) = self.bounds().unwrap_or_default();
        let integer = json!({ "type": "integer", "minimum": low, "maximum": high });
        match &self.ty {
            FieldType::Unsigned { .. } => integer,
            FieldType::Bool if low == high => json!({ "const": low != 0 }),
            FieldType::Bool => json!({ "type": "boolean" }),
            FieldType::Enum { flags, names, .. } => {
                let names: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
                let mut one = json!({ "enum": names });
                if self.range.is_some() {
                    one = json!({ "anyOf": [one, integer] });
                }
                if *flags {
                    let list = json!({ "type": "array", "items": one, "minItems": 1 });
                    one = json!({ "anyOf": [one, list] });
                }
                one
            }
            FieldType::Ip => json!({ "type": "string", "pattern": "^[0-9a-fA-F.:]+$" }),
            FieldType::Prefix => {
                json!({ "type": "string", "pattern": "^[0-9a-fA-F.:]+(/[0-9]{1,3})?$" })
            }
            FieldType::Mac => json!({
                "type": "string",
                "pattern": "^[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}$",
            }),
            FieldType::Device | FieldType::Chain => json!({ "type": "string", "minLength": 1 }),
            FieldType::Port | FieldType::PortRange => json!({
                "anyOf": [
                    { "type": "integer", "minimum": 1, "maximum": u16::MAX },
                    { "type": "string", "minLength": 1 },
                ]
            }),
            FieldType::Token => {
                json!({ "type": "string", "pattern": "^(0x)?[0-9a-fA-F]{1,8}$" })
            }
            FieldType::Duration => {
                json!({ "type": "string", "pattern": "^[0-9]+(ns|us|ms|s|m|h)$" })
            }
            FieldType::Bytes => {
                let most = self.array.map_or(1, |array| array.capacity);
                let pattern = format!("^[ :]*([0-9a-fA-F][ :]*[0-9a-fA-F][ :]*){{1,{most}}}$");
                json!({ "type": "string", "pattern": pattern })
            }
        }
    }
}

fn from_element() -> Value {
    json!({
        "type": "object",
        "properties": { "from": { "const": "element" } },
        "required": ["from"],
        "additionalProperties": false,
    })
}

fn described(field: &Field, schema: Value) -> Value {
    let mut object = Map::new();
    object.insert("description".to_owned(), field.doc.as_str().into());
    if let Value::Object(schema) = schema {
        object.extend(schema);
    }
    if let Some(default) = field.default_value() {
        object.insert("default".to_owned(), default);
    }
    Value::Object(object)
}
