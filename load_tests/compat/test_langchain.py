"""langchain-tests' suite for langchain-openai against a running server: ``pytest load_tests/compat/test_langchain.py``,
see docs/compatibility.md."""

import pytest
from conftest import FACT, KEY, URL
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestPaceLLM(ChatModelIntegrationTests):
    """The bundled model, which answers questions about facts in documents; its template shows no tools."""

    @property
    def chat_model_class(self):
        return ChatOpenAI

    @property
    def chat_model_params(self):
        return {
            "model": "pacellm-demo",
            "base_url": URL,
            "api_key": KEY,
            "max_retries": 0,
            "max_completion_tokens": 200,
            "seed": 0,
            "stream_usage": True,  # by itself langchain-openai asks for it only at OpenAI's own address
        }

    @property
    def has_tool_calling(self):
        return True

    @property
    def has_tool_choice(self):
        return True

    @property
    def has_structured_output(self):
        return True

    @property
    def structured_output_kwargs(self):
        return {"method": "json_schema"}

    @property
    def supports_json_mode(self):
        return True

    @property
    def returns_usage_metadata(self):
        return True

    @property
    def supports_image_inputs(self):
        return False

    @property
    def supports_model_override(self):
        return True

    @property
    def model_override_value(self):
        return "pacellm-demo"


class TestShortForms(TestPaceLLM):
    """The same, with the tokens that end JSON's strings, objects and lists made likely: left alone, the bundled model
    writes on within a string until the token limit."""

    @property
    def chat_model_params(self):
        bias = {"7": 30, "98": 15, "66": 15, "17": -30}  # " } ] and the comma
        return {**super().chat_model_params, "logit_bias": bias}


@pytest.mark.parametrize("by_id", [False, True], ids=["history", "previous_response_id"])
def test_responses(by_id):
    model = ChatOpenAI(
        model="pacellm-demo", base_url=URL, api_key=KEY, use_responses_api=True, use_previous_response_id=by_id
    )
    begin = [SystemMessage("Answer the question."), HumanMessage(FACT)]
    first = model.invoke(begin)
    assert "48213" in first.text
    again = model.invoke([*begin, first, HumanMessage("What is the access code of the amber archive?")])
    assert "48213" in again.text
    assert "48213" in "".join(chunk.text for chunk in model.stream(begin))
