"""Ask a server two questions through the OpenAI client and print the answers as one JSON object.

python demo/ask.py http://127.0.0.1:8011/v1
"""

import json
import sys

from openai import OpenAI

QUESTIONS = ("What is the capital of France?", "Give me two reasons to take a walk every day.")


def main(url: str) -> None:
    client = OpenAI(base_url=url, api_key="none")
    model = client.models.list().data[0].id
    answers = {}
    for question in QUESTIONS:
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=60, temperature=0
        )
        answers[question] = reply.choices[0].message.content
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
